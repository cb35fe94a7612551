"""A slow reference of every schedule, for any family: one sample at full length with whole attention matrices.

It runs the layers of Hugging Face's model one by one under a custom attention function, which computes the whole weight
matrix and lets a schedule's rule edit it after the softmax. It shares no code with models/.
"""

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from models.schedules import (
    VTW,
    CDPruner,
    Dense,
    DivPrune,
    FastV,
    Fused,
    PyramidDrop,
    Random,
    ShortV,
    SparseVLM,
    VisionZip,
    VisiPruner,
)

NAME = "slow_reference"


class _Attention:
    """Softmax attention that records weights (H, S, S), values (H, S, d) and output (H, S, d) of its last call."""

    def __init__(self):
        self.edit, self.weights, self.values, self.output = None, None, None, None

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **_):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        weights = (query @ key.transpose(2, 3) * scaling + attention_mask).softmax(dim=-1)
        if self.edit is not None:
            weights = weights.clone()
            self.edit(weights[0])
        output = weights @ value
        self.weights, self.values, self.output = weights[0], value[0], output[0]
        return output.transpose(1, 2), weights


ATTENTION = _Attention()
ALL_ATTENTION_FUNCTIONS.register(NAME, ATTENTION)


def mask_shallow(weights, visual, number, rule):
    """Applies VisiPruner's shallow rule of layer `number` to weights (H, S, S), in place."""
    images = visual.nonzero().flatten().tolist()
    if not images:
        return
    for row in range(len(visual)):  # rows before the image too: Molmo2's markers see ahead into it
        if visual[row]:
            if number == 0 or not rule.visual_self_attention:
                weights[:, row, images] = 0
        elif number > 0:
            weights[:, row, images] = 0
        elif rule.first_layer == "half":
            weights[:, row, images[: len(images) // 2]] = 0
        else:
            mass = weights[:, row, images].sum(dim=-1)
            weights[:, row, images] = 0
            weights[:, row, images[0]] = mass


class SlowDecoder:
    """The text model of a Hugging Face VLM, at one sample without padding.

    `batch` has the inputs of forward and, for CDPruner, the relevance of visual tokens (1, S).

    Attributes:
        visual: (S,) bool.
        embeds: (1, S, D), the image merged in.
    """

    def __init__(self, model, batch):
        self.model, self.text_model = model, model.model.get_decoder()
        batch = dict(batch)
        self.relevance, self.pixels = batch.pop("relevance", None), batch.get("pixel_values")
        self.visual = batch["input_ids"][0] == model.config.image_token_id
        self.blocks = _blocks(model, batch)
        seen = {}
        hook = self.text_model.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
        with torch.no_grad():
            model(**batch, use_cache=False)
        hook.remove()
        self.embeds, self.features = seen["inputs_embeds"], list(seen.get("deepstack_visual_embeds") or ())
        size, positions = self.embeds.shape[1], seen.get("position_ids")
        if positions is None:
            positions = torch.arange(size)[None]
        self.three = positions.ndim == 3 or "mrope_section" in (self.text_model.config.rope_parameters or {})
        if self.three:
            positions = positions[-3:] if positions.ndim == 3 else positions.expand(3, 1, -1)
        self.positions = positions

    def rotary(self, number, positions=None):
        decoder, at = self.text_model, self.positions if positions is None else positions
        if hasattr(decoder, "rope_types"):
            scaled = decoder.rope_types[number] == "scaled"
            return (decoder.rotary_emb if scaled else decoder.rotary_emb_unscaled)(self.embeds, at)
        if type(decoder).__name__ == "Gemma3TextModel":
            return decoder.rotary_emb(self.embeds, at, decoder.config.layer_types[number])
        return decoder.rotary_emb(self.embeds, at)

    def mask(self, number, keys):
        """Returns the additive mask (1, 1, S, S): causal or same block, within the window, for `keys` (S,) only."""
        size, attention = len(keys), self.text_model.layers[number].self_attn
        rows, columns = torch.arange(size)[:, None], torch.arange(size)[None]
        allowed = columns <= rows
        if self.blocks is not None:
            allowed |= (self.blocks[:, None] == self.blocks[None]) & (self.blocks >= 0)[None]
        window = getattr(attention, "sliding_window", getattr(self.text_model.config, "sliding_window", None))
        if window is not None:
            allowed &= rows - columns < window
        allowed = (allowed & keys[None]) | (rows == columns)  # a dead row must see at least one key
        return torch.zeros(1, 1, size, size).masked_fill(~allowed, torch.finfo(torch.float32).min)

    def layer(self, number, hidden, keys, edit=None, positions=None):
        """Returns the output of a layer (1, S, D) with `keys` (S,) bool as its keys; ATTENTION records the weights."""
        layer, before = self.text_model.layers[number], self.text_model.config._attn_implementation
        self.text_model.config._attn_implementation, ATTENTION.edit = NAME, edit
        try:
            inputs = {"attention_mask": self.mask(number, keys), "position_embeddings": self.rotary(number, positions)}
            return layer(hidden, position_ids=None, past_key_values=None, **inputs)
        finally:
            self.text_model.config._attn_implementation, ATTENTION.edit = before, None

    @torch.no_grad()
    def run(self, schedule, last=None, base=None):
        """Returns the logits (S, vocabulary) and the positions that each layer runs on.

        `last` is the position of the instruction's last token; None: the last text token. Sets `soft`: for each cut of
        a stage plan, the soft choice of every token. Given `base`, the `soft` of an earlier run, multiplies the weights
        on a kept token's value by 1 + soft - base.
        """
        text, hidden, rule, places = ~self.visual, self.embeds, _Rule(self, schedule, base), []
        last, features = int(text.nonzero()[-1]) if last is None else last, list(self.features)
        self.soft = rule.soft
        for number in range(len(self.text_model.layers)):
            live = rule.live(number, hidden, last)
            hidden = rule.states(hidden)
            keys = text | live
            positions = (keys.long().cumsum(0) - 1).clamp(min=0)[None] if schedule.renumbers else None
            output = self.layer(number, hidden, keys, rule.edit(number), positions)
            rule.after(number, live, last)
            only_keys = schedule.update == "kv" or (isinstance(schedule, ShortV) and number in schedule.layers)
            runs = text if only_keys else keys
            hidden = torch.where(runs[:, None], output, hidden)
            if live.any() and features:
                added = torch.zeros_like(hidden)
                added[0, self.visual] = features.pop(0)
                hidden = hidden + added * live[:, None]
            places.append(keys.nonzero().flatten().tolist())
        return self.model.lm_head(self.text_model.norm(hidden))[0], places


class _Rule:
    """Selects the live visual tokens by the published rule of a schedule."""

    def __init__(self, decoder, schedule, base=None):
        self.decoder, self.schedule = decoder, schedule
        self.base, self.soft, self.gates = base, [], torch.ones(len(decoder.visual), dtype=decoder.embeds.dtype)
        self.kept, self.scores, self.quiet, self.fired = decoder.visual.clone(), None, 0, False
        self.weights, self.merged = None, {}

    def live(self, number, hidden, last):
        rule, visual, total = self.schedule, self.decoder.visual, int(self.decoder.visual.sum())
        nothing = torch.zeros_like(visual)
        if isinstance(rule, Dense):
            return visual
        if isinstance(rule, VTW):
            return visual if number < rule.layer else nothing
        if isinstance(rule, Fused):
            if number in rule.plan.keep:
                self._cut(rule.plan.keep[number], total, rule.plan.select, last)
            return self.kept if rule.plan.sees(number) else nothing
        if isinstance(rule, FastV) and number == rule.layer:
            self._keep(self.scores, round(total * (1 - rule.drop)))
        if isinstance(rule, PyramidDrop) and number in rule.layers:
            keys = ~visual | self.kept
            positions = (keys.long().cumsum(0) - 1).clamp(min=0)[None] if rule.renumbers else None
            self.decoder.layer(number, hidden, keys, positions=positions)
            ahead = ATTENTION.weights[:, last].mean(dim=0)
            self._keep(ahead, int(total * rule.ratios[rule.layers.index(number)]))
        if isinstance(rule, Random) and number == rule.layer:
            drawn = torch.randperm(total, generator=torch.Generator().manual_seed(rule.seed))[: int(total * rule.ratio)]
            self.kept = torch.zeros_like(visual)
            self.kept[visual.nonzero().flatten()[drawn]] = True
        self._baseline(rule, number, hidden, total)
        return self.kept

    def _baseline(self, rule, number, hidden, total):
        visual = self.decoder.visual
        if isinstance(rule, DivPrune) and number == 0:
            self._choose(max_min_choice(self.decoder.embeds[0, visual], max(1, round(total * rule.ratio))))
        if isinstance(rule, CDPruner) and number == 0 and total:
            relevance = self.decoder.relevance[0, visual]
            count = max(1, round(total * rule.tokens / 576))
            self._choose(most_likely_set(self.decoder.embeds[0, visual], relevance, count))
        if isinstance(rule, VisionZip) and number == 0 and total:
            self.merged = visionzip_tokens(self.decoder, rule)
            self.kept = torch.zeros_like(visual)
            self.kept[list(self.merged)] = True
        if isinstance(rule, SparseVLM) and number in rule.layers and self.kept.any():
            self._recycle(rule, hidden, rule.tokens[rule.layers.index(number)] / 576)

    def states(self, hidden):
        """Returns hidden states (1, S, D) with the merged tokens' states, computed by `live`."""
        hidden = hidden.clone()
        for place, state in self.merged.items():
            hidden[0, place] = state
        self.merged = {}
        return hidden

    def _cut(self, amount, total, select, last):
        count = min(amount, total) if isinstance(amount, int) else int(total * amount)
        if select == "diversity":
            self._choose(max_min_choice(self.decoder.embeds[0, self.decoder.visual], count))
            return
        if select == "learned":
            self.scores = scorer_scores(self.decoder, last)
        elif self.scores is not None:
            self.scores = self.scores.log()
        if self.kept.any():
            self._soften(self.scores, count)
        self._keep(self.scores, count)

    def _soften(self, logits, count):
        places, number = self.kept.nonzero().flatten(), len(self.soft)
        self.soft.append(soft_choice(logits[places], count))
        if self.base is not None:
            self.gates[places] *= 1 + self.soft[number] - self.base[number]

    def _choose(self, chosen):
        places = self.decoder.visual.nonzero().flatten()
        self.kept = torch.zeros_like(self.kept)
        self.kept[places[chosen]] = True

    def _recycle(self, rule, hidden, ratio):
        places, total = self.kept.nonzero().flatten().tolist(), int(self.decoder.visual.sum())
        raters = text_raters(self.decoder)
        score = {place: float(self.weights[:, raters, place].mean()) for place in places}
        ranked = sorted(places, key=lambda place: -score[place])
        count = min(max(1, round(total * ratio)), len(places) - 1)
        gone = ranked[count:]
        recycled = sorted(gone[: int(0.3 * len(gone)) + 1])
        states = [hidden[0, place] for place in recycled]
        self.merged = {
            recycled[centre]: state for centre, state in cluster_means(states, len(recycled) // 10 + 1).items()
        }
        self.kept = torch.zeros_like(self.kept)
        self.kept[ranked[:count] + list(self.merged)] = True

    def _keep(self, scores, count):
        kept = self.kept.nonzero().flatten().tolist()
        self.kept = torch.zeros_like(self.kept)
        self.kept[sorted(kept, key=lambda place: -float(scores[place]))[:count]] = True

    def edit(self, number):
        rule = self.schedule
        if self.base is not None:
            return lambda weights: weights.mul_(self.gates)
        if not isinstance(rule, VisiPruner) or "shallow" not in rule.modes or number >= rule.shallow_end:
            return None
        return lambda weights: mask_shallow(weights, self.decoder.visual, number, rule)

    def after(self, number, live, last):
        if live.any():
            self.weights = ATTENTION.weights / self.gates
            self.scores = self.weights[:, last].mean(dim=0)
        rule = self.schedule
        if not isinstance(rule, VisiPruner) or "middle" not in rule.modes or number <= rule.shallow_end:
            return
        if not live.any():
            return
        added = (ATTENTION.weights[:, last, :, None] * ATTENTION.values).transpose(0, 1).flatten(1)[live]
        output = ATTENTION.output[:, last].flatten()
        cosines = torch.cosine_similarity(output[None] - added, output[None], dim=-1)
        if not self.fired:
            if (cosines < rule.layer_threshold).any():
                self.fired, kept = True, torch.zeros_like(live)
                kept[live] = added.norm(dim=-1) > rule.token_threshold
                self.kept = kept
        elif "deep" in rule.modes and bool((cosines >= rule.exit_threshold).all()):
            self.quiet += 1
            if self.quiet == rule.exit_patience:
                self.kept = torch.zeros_like(live)


def scorer_scores(decoder, last):
    """Returns (S,): the scores of the model's learned scorer, given the text up to position `last`."""
    scorer, rows = decoder.text_model.token_scorer, decoder.embeds[0]
    rows = rows / rows.square().mean(dim=1, keepdim=True).add(1e-6).sqrt()
    text = rows[: last + 1][~decoder.visual[: last + 1]]
    mean = ((text @ scorer.word.weight[0]).softmax(dim=0)[:, None] * text).sum(dim=0)
    query = scorer.instruction.weight @ (mean / mean.square().mean().add(1e-6).sqrt()) + scorer.instruction.bias
    return rows @ scorer.feature.weight.T @ query / 8


def soft_choice(logits, count):
    """Returns (N,): sigmoids around the threshold at which they add up to `count`."""
    if not 0 < count < len(logits):
        return torch.full_like(logits, float(count > 0))
    low, high = float(logits.min()) - 50, float(logits.max()) + 50
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float(torch.sigmoid(logits - middle).sum()) > count else (low, middle)
    return torch.sigmoid(logits - (low + high) / 2)


def max_min_choice(features, count):
    """Returns DivPrune's choice of `count` rows: the most isolated one, then always the farthest from those chosen."""

    def distance(one, other):
        return 1 - float(torch.cosine_similarity(features[one], features[other], dim=0))

    def farthest(places, value):
        best = max(map(value, places), default=0.0)
        return next(place for place in places if value(place) >= best - 1e-6)

    chosen, others = [], list(range(len(features)))
    while others and len(chosen) < count:
        compared = chosen or others
        value = {one: min([distance(one, other) for other in compared if other != one], default=9.0) for one in others}
        chosen.append(farthest(others, value.__getitem__))
        others.remove(chosen[-1])
    return chosen


def most_likely_set(features, relevance, count):
    """Returns CDPruner's choice of `count` rows: each adds most to the determinant of the kernel."""
    weight = -relevance
    spread = weight.max() - weight.min()
    weight = (weight - weight.min() + 1e-6) / spread if spread > 0 else torch.ones_like(weight)
    rows = (weight[:, None] * features / features.norm(dim=1, keepdim=True)).double()
    chosen = []
    for _ in range(count):
        others = [place for place in range(len(rows)) if place not in chosen]
        chosen.append(max(others, key=lambda place: float((rows[[*chosen, place]] @ rows[[*chosen, place]].T).det())))
    return chosen


def text_raters(decoder):
    """Returns the positions of SparseVLM's raters: text tokens after the image with above-average attention from it."""
    visual = decoder.visual.nonzero().flatten().tolist()
    text = list(range(visual[-1] + 1, len(decoder.visual))) or (~decoder.visual).nonzero().flatten().tolist()
    likeness = decoder.embeds[0, visual] @ decoder.embeds[0, text].T
    mean = likeness.softmax(dim=1).mean(dim=0)
    return [place for place, value in zip(text, mean.tolist(), strict=True) if value > 1 / len(text)] or text


def cluster_means(states, count):
    """Clusters a list of states (D,) by density peaks; returns {centre: mean of its cluster}, `count` of them."""
    scale, places = len(states[0]) ** 0.5, range(len(states))
    distance = [[float((one - other).norm()) / scale for other in states] for one in states]
    density = [torch.tensor(sorted(row)[:count]).square().mean().neg().exp().item() for row in distance]
    farthest = max(map(max, distance))
    denser = [[distance[one][other] for other in places if density[other] > density[one]] for one in places]
    peak = [density[one] * min(denser[one], default=farthest) for one in places]
    centres = sorted(places, key=lambda place: -peak[place])[:count]
    member = {one: one if one in centres else min(centres, key=lambda centre: distance[one][centre]) for one in places}
    return {
        centre: torch.stack([states[one] for one in places if member[one] == centre]).mean(dim=0) for centre in centres
    }


def visionzip_tokens(decoder, rule):
    """Returns VisionZip's {position: projected token}, for a LLaVA whose CLIP class token has no position."""
    model, seen, found = decoder.model.model, {}, {}
    layer = model.vision_tower.encoder.layers[model.config.vision_feature_layer]
    hook = layer.self_attn.k_proj.register_forward_hook(lambda *arguments: seen.update(keys=arguments[2]))
    with torch.no_grad():
        tower = model.vision_tower(decoder.pixels, output_attentions=True, output_hidden_states=True)
    hook.remove()
    visual = decoder.visual.nonzero().flatten().tolist()
    for image in range(len(decoder.pixels)):
        hidden, weights = tower.hidden_states[-1][image], tower.attentions[-1][image]
        keys = seen["keys"][image].unflatten(-1, (weights.shape[0], -1)).mean(dim=1)
        size = len(hidden) - 1
        dominant, contextual = (round(count * size / 576) for count in (rule.dominant, rule.contextual))
        ranked = sorted(range(1, size + 1), key=lambda patch: -float(weights[:, 0, patch].sum()))
        best, rest = sorted(ranked[: dominant - 1]), sorted(ranked[dominant - 1 :])
        targets = rest[:: len(rest) // contextual][:contextual]
        joined = {target: [] for target in targets}
        for patch in rest:
            if patch not in targets:
                closest = max(targets, key=lambda target: float(torch.cosine_similarity(keys[patch], keys[target], 0)))
                joined[closest].append(hidden[patch])
        tokens = {patch: hidden[patch] for patch in best}
        tokens[next(patch for patch in rest if patch not in targets)] = hidden[0]
        for target, members in joined.items():
            tokens[target] = hidden[target] + (torch.stack(members).mean(dim=0) if members else 0)
        for patch, token in tokens.items():
            found[visual[image * size + patch - 1]] = model.multi_modal_projector(token)
    return found


def _blocks(model, batch):
    """Returns (S,) block numbers of the families whose image tokens see each other in both directions, or None."""
    name = type(model).__name__
    if "Gemma3" in name:
        blocks, number = [], -1
        types = batch["token_type_ids"][0].tolist()
        for place, kind in enumerate(types):
            number += kind == 1 and (place == 0 or types[place - 1] != 1)
            blocks.append(number if kind == 1 else -1)
        return torch.tensor(blocks)
    if "Molmo2" in name:
        return torch.where(batch["mm_token_type_ids"][0] == 1, 0, -1)
    return None
