import torch

from data.dataset import Collator


def sample(size, images=0):
    ids = torch.arange(1, size + 1)
    pixels = {"pixel_values": torch.full((images, 3, 2, 2), float(size))} if images else {}
    return {"input_ids": ids, "labels": ids.clone(), **pixels}


def test_samples_are_padded_on_the_right():
    batch = Collator(99)([sample(3, images=1), sample(5), sample(1, images=2)])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 99, 99], [1, 2, 3, 4, 5], [1, 99, 99, 99, 99]]
    assert batch["labels"].tolist() == [[1, 2, 3, -100, -100], [1, 2, 3, 4, 5], [1, -100, -100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5, [1, 0, 0, 0, 0]]


def test_images_stand_in_the_order_of_the_samples():
    batch = Collator(0)([sample(3, images=1), sample(5), sample(1, images=2)])
    assert batch["pixel_values"].shape == (3, 3, 2, 2)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [3.0, 1.0, 1.0]


def test_a_batch_without_an_image_has_no_pixel_values():
    assert set(Collator(0)([sample(2), sample(3)])) == {"input_ids", "attention_mask", "labels"}


def test_numbers_of_patches_go_on_from_sample_to_sample():
    def molmo2(crops, numbers):
        return {**sample(2), "pixel_values": torch.zeros(crops, 4, 3), "image_token_pooling": torch.tensor(numbers)}

    batch = Collator(0)([molmo2(2, [[0, 1], [7, -1]]), sample(3), molmo2(1, [[2, 3]])])
    assert batch["image_token_pooling"].tolist() == [[0, 1], [7, -1], [10, 11]]
