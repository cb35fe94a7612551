"""A few made-up rows of each standard benchmark, in the layout that lmms-eval's own tasks read.

`datasets.load_dataset("lmms-lab-encoder/POPE")` takes a local folder of that relative name first, so the unchanged
tasks run on these rows, offline, from the folder that holds them.
"""

from datasets import Dataset, Image, Sequence
from PIL import Image as Pillow

WORD = "circle"


def picture(number):
    return Pillow.new("RGB", (40 + 8 * number, 48), (200, 20 * number % 255, 90))


def write(root, name, split, rows, config=None, image_list=False):
    """Writes rows (dicts, `image` a Pillow image or a list of them) as lmms-eval expects to find them."""
    folder = root / "lmms-lab-encoder" / name
    place = folder / (config or "data")
    place.mkdir(parents=True, exist_ok=True)
    table = Dataset.from_list(rows)
    if "image" in rows[0]:
        table = table.cast_column("image", Sequence(Image()) if image_list else Image())
    table.to_parquet(str(place / f"{split}-00000-of-00001.parquet"))
    return folder, place, split


def readme(folder, configs):
    """Writes the README that names a repository's configs and where their files are."""
    lines = ["---", "configs:"]
    for config, split, place in configs:
        lines += [f"- config_name: {config}", "  data_files:", f"  - split: {split}", f"    path: {place}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


def gqa(root):
    asked = [
        {
            "id": f"q{n}",
            "imageId": f"i{n // 2}",
            "question": f"What shape is number {n}?",
            "answer": WORD,
            "isBalanced": True,
        }
        for n in range(4)
    ]
    images = [{"id": f"i{n}", "image": picture(n)} for n in range(2)]
    write(root, "GQA", "testdev", asked, "testdev_balanced_instructions")
    folder, *_ = write(root, "GQA", "testdev", images, "testdev_balanced_images")
    names = ("testdev_balanced_instructions", "testdev_balanced_images")
    readme(folder, [(name, "testdev", name) for name in names])


def textvqa(root):
    rows = [
        {"image_id": f"i{n}", "question_id": n, "question": "What Does the Sign say?", "image": picture(n),
         "answers": [WORD] * 10, "ocr_tokens": ["STOP", "HERE"]}
        for n in range(4)
    ]  # fmt: skip
    write(root, "textvqa", "validation", rows)


def pope(root):
    rows = [
        {"id": str(n), "question_id": str(n), "question": "Is there a circle in the image?", "image": picture(n),
         "answer": "yes" if n % 2 else "no", "image_source": f"i{n // 2}", "category": "random"}
        for n in range(4)
    ]  # fmt: skip
    write(root, "POPE", "test", rows)


def mme(root):
    rows = [
        {"question_id": f"color/{n // 2}.png", "image": picture(n), "answer": "Yes" if n % 2 else "No",
         "question": "Is the shape red? Please answer yes or no.", "category": "color"}
        for n in range(4)
    ]  # fmt: skip
    write(root, "MME", "test", rows)


def mmbench(root):
    rows = [
        {"index": n, "question": "Which shape is it?", "hint": "nan", "answer": "A", "image": picture(n), "A": WORD,
         "B": "triangle", "C": "rectangle", "D": "nan", "category": "shape", "L2-category": "perception",
         "source": "made", "split": "dev", "comment": "nan"}
        for n in range(4)
    ]  # fmt: skip
    folder, *_ = write(root, "MMBench", "dev", rows, "en")
    readme(folder, [("en", "dev", "en")])


def scienceqa(root):
    rows = [
        {"image": picture(n), "question": "Which shape is it?", "choices": [WORD, "triangle"], "answer": 0,
         "hint": "It rolls." if n % 2 else ""}
        for n in range(4)
    ]  # fmt: skip
    folder, *_ = write(root, "ScienceQA", "test", rows, "ScienceQA-IMG")
    readme(folder, [("ScienceQA-IMG", "test", "ScienceQA-IMG")])


def vqav2(root):
    answers = [{"answer": WORD, "answer_confidence": "yes", "answer_id": n} for n in range(10)]
    rows = [
        {"question_id": n, "image_id": n // 2, "question": "What shape is it?", "image": picture(n), "answers": answers,
         "question_type": "what", "multiple_choice_answer": WORD, "answer_type": "other"}
        for n in range(4)
    ]  # fmt: skip
    write(root, "VQAv2", "validation", rows)


def seedbench(root):
    rows = [
        {"question_id": str(n), "data_type": "image", "image": [picture(n)], "question": "Which shape is it?",
         "choice_a": WORD, "choice_b": "triangle", "choice_c": "rectangle", "choice_d": "star", "answer": "A"}
        for n in range(4)
    ]  # fmt: skip
    write(root, "SEED-Bench", "test", rows, image_list=True)


def vizwiz(root):
    rows = [
        {"question_id": f"v{n}", "question": "What is THIS?", "image": picture(n), "answers": [WORD] * 10,
         "category": "other"}
        for n in range(4)
    ]  # fmt: skip
    write(root, "VizWiz-VQA", "val", rows)


# task: (writes its rows, an answer that is right on all or half of them, what the prompt ends with)
PHRASE = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
ROWS = {
    "gqa": (gqa, WORD, PHRASE),
    "textvqa_val": (textvqa, WORD, "What does the sign say?" + PHRASE),
    "textvqa_val_ocr": (textvqa, WORD, "What does the sign say?\nReference OCR token: STOP, HERE" + PHRASE),
    "pope": (pope, "yes", "Is there a circle in the image?" + PHRASE),
    "mme": (mme, "yes", "Is the shape red?" + PHRASE),
    "mmbench_en_dev_static": (mmbench, "A", "\n" + LETTER),
    "scienceqa_img": (scienceqa, "A", LETTER),
    "vqav2_val": (vqav2, WORD, PHRASE),
    "seedbench": (seedbench, "A", "D. star" + LETTER),
    "vizwiz_vqa_val": (vizwiz, WORD, "respond with 'Unanswerable'." + PHRASE),
}
