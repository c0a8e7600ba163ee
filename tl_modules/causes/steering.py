"""`steering_effect`: generate with a module turned up, and measure topic shift and cost."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from tl_modules._checks import check_choice, check_integer, refuse
from tl_modules.bases import as_basis
from tl_modules.causes.generation import check_room, continued, loss_of_written
from tl_modules.causes.passages import Passages
from tl_modules.causes.topics import (
    TopicClassifier,
    known_texts,
    own_topic,
    predicted_modules,
    topic_classifier,
)
from tl_modules.host import tokenizer_of
from tl_modules.interventions import reference_means, steer
from tl_modules.module import Module
from tl_modules.prompts import read_prompts
from tl_modules.sites import Basis
from tl_modules.tokens import TokenSettings, tokenize
from tl_modules.unit_values import start_token

SAMPLE_MEAN = "sample mean"
Scale = float | int | str
SCALES: tuple[Scale, ...] = (1.5, 2.0, SAMPLE_MEAN)


@dataclass(frozen=True, eq=False, repr=False)
class SteeringEffect:
    """What turning a module up does to what a model writes; made by `steering_effect`.

    Args:
        table: a row a setting; `steering_effect` says what its columns are.
        texts: a row a setting and prompt.
        topic: the module's own topic.
        name: the module's name.
        classifier_accuracy: the classifier's share right on the known texts, by cross-validation.
    """

    table: pd.DataFrame
    texts: pd.DataFrame
    topic: str
    name: str
    classifier_accuracy: float

    def __repr__(self) -> str:
        highest = int(self.table["topic_probability"].argmax())
        first, best = self.table.iloc[0], self.table.iloc[highest]
        shift = f"{first['topic_probability']:.2f} to {best['topic_probability']:.2f}"
        return f"SteeringEffect({self.name!r}, P({self.topic}) {shift} at {best['steering']})"

    def _repr_html_(self) -> str:
        table = self.table.to_html(index=False, float_format=lambda value: f"{value:.3g}")
        return f"<p><strong>{self!r}</strong></p>{table}"


def steering_effect(
    model: Any,
    module: Any,
    prompts: Any,
    *,
    scales: Sequence[Scale] = SCALES,
    n_tokens: int = 40,
    seed: int | None = None,
    known: pd.DataFrame | None = None,
    topic: str | None = None,
    held_out: Any = None,
    chat: bool | str | None = None,
    basis: str | Basis = "neurons",
    progress: bool = True,
) -> SteeringEffect:
    """Let a model write with a module steered, and say where the topic goes and what it costs.

    What was written is judged by the model as it is, not steered, in three ways: by the module that
    `Modules.predict` puts it in; by a classifier that sees only its words (TF-IDF and logistic regression);
    and by its loss. The first two can be wrong on so short a text: compare with the row "none". A
    model whose module is turned up too far writes digits and marks, which a classifier of words may take for
    mathematics or code: read the topic beside the loss.

    Args:
        model: the HookedTransformer or TransformerBridge that the modules were found in, with a tokenizer.
        module: `modules[k]`.
        prompts: what is continued, anything that `collect` takes.
        scales: factors for all values of the module's units; "sample mean" holds them at their means over the
            module's own samples, run as plain text. A row without steering comes first.
        n_tokens: how many tokens to write; an end token does not end it.
        seed: None writes the most likely tokens; a number draws them at temperature 1, the same draws for
            each scale.
        known: texts and their category for the classifier; None: the samples that the modules were found in.
        topic: the category that the module stands for; None: the one that its samples have most above its
            share of all samples.
        held_out: prompts on whose tokens the loss under steering is measured; None: `prompts`.
        chat: for `prompts` and `held_out`, as in `collect`.
        basis: what the modules' units are: "neurons", "heads" or a `Basis`.
        progress: show a progress bar over the settings.

    Returns:
        A `SteeringEffect`. Columns of its table, means over the prompts: steering ("none", "x 2", "sample
        mean"), scale (nan for the last), module_share (texts that `predict` puts in this module),
        module_score (mean z-score of the module's units over the text), topic_share (texts that the
        classifier gives this topic), topic_probability, loss_written (loss a token of the text for the model
        as it is), perplexity_written (e to that), loss_held_out_change (under steering, loss a token on the
        held-out prompts less that without). Columns of `texts`: steering, prompt (its number), text, module,
        module_score, topic, topic_probability, loss_written.

    Raises:
        InputError: a module, prompts or settings that cannot be used.

    Example:
        >>> steering_effect(None, modules[0], ["Once"], scales=["mean"])
        Traceback (most recent call last):
        ...
        tl_modules._checks.InputError: scales: got 'mean', expected one of 'sample mean'. Did you mean...
    """
    check_integer("n_tokens", n_tokens, least=1)
    if not isinstance(module, Module):
        refuse("module", got=f"a {type(module).__name__}", want="a Module, such as modules[0]")
    settings = _settings(scales)
    table = known_texts(known, module)
    topic = own_topic(module) if topic is None else str(topic)
    check_choice("topic", topic, table["category"].unique())
    tokenizer_of(model)
    basis = as_basis(basis)
    start = start_token(basis)
    settings_of = TokenSettings(chat=chat, prepend_bos=start)
    tokens = tokenize(model, read_prompts(prompts), settings_of).tokens
    check_room(model, tokens, n_tokens)
    scored = prompts if held_out is None else held_out
    passages = Passages(model, scored, chat=chat, prepend_bos=start)
    classifier = topic_classifier(table["text"].tolist(), table["category"].tolist())
    way = _Steered(model, module, basis, SAMPLE_MEAN in settings.values())
    clean = passages.scores(model).mean_loss()
    rows, texts = [], []
    for name, scale in tqdm(settings.items(), desc="steer", disable=not progress):
        with way.at(scale):
            written = continued(model, tokens, n_tokens, seed=seed)
            held = passages.scores(model).mean_loss()
        judged = _judged(model, module, basis, classifier, topic, tokens, written)
        texts.append(judged.assign(steering=name)[["steering", *judged]])
        rows.append({"steering": name, "scale": np.nan if scale == SAMPLE_MEAN else scale})
        rows[-1] |= _means(judged, module, topic) | {"loss_held_out_change": float((held - clean).mean())}
    whole = pd.concat(texts, ignore_index=True)
    return SteeringEffect(pd.DataFrame(rows), whole, topic, module.name, classifier.accuracy)


def _settings(scales: Sequence[Scale]) -> dict[str, Scale]:
    """What to do by name; first nothing."""
    if isinstance(scales, str) or not isinstance(scales, Sequence | np.ndarray) or not len(scales):
        got = "none" if isinstance(scales, Sequence) and not scales else repr(scales)
        refuse("scales", got=got, want="a list of at least one")
    settings: dict[str, Scale] = {"none": 1.0}
    for scale in scales:
        if isinstance(scale, str):
            check_choice("scales", scale, [SAMPLE_MEAN])
            settings[scale] = scale
        elif not isinstance(scale, int | float | np.number) or not np.isfinite(scale):
            refuse("scales", got=repr(scale), want="finite numbers")
        elif scale != 1:
            settings[f"x {scale:g}"] = float(scale)
    return settings


class _Steered:
    """The module steered in one way or another; its means are taken only once."""

    def __init__(self, model: Any, module: Module, basis: Basis, needs_means: bool) -> None:
        self._model, self._module, self._basis = model, module, basis
        self._means = None
        if needs_means:
            texts = module.samples["text"].tolist()
            self._means = reference_means(model, texts, module, basis=basis, progress=False)

    def at(self, scale: Scale) -> AbstractContextManager[Any]:
        if scale == SAMPLE_MEAN:
            return steer(self._model, self._module, to_sample_mean_of=self._means, basis=self._basis)
        if scale == 1:
            return nullcontext()
        return steer(self._model, self._module, scale=float(scale), basis=self._basis)


def _judged(
    model: Any,
    module: Module,
    basis: Basis,
    classifier: TopicClassifier,
    topic: str,
    tokens: list[Int[np.ndarray, " _"]],
    written: list[Int[np.ndarray, " _"]],
) -> pd.DataFrame:
    """One row a prompt, from the model as it is."""
    tokenizer = tokenizer_of(model)
    texts = [tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in written]
    predicted, score = predicted_modules(model, module, written, basis)
    probability: Float[np.ndarray, "text topic"] = classifier.probabilities(texts)
    return pd.DataFrame(
        {
            "prompt": np.arange(len(texts)),
            "text": texts,
            "module": predicted,
            "module_score": score,
            "topic": np.array(classifier.topics, dtype=object)[probability.argmax(1)],
            "topic_probability": probability[:, classifier.topics.index(topic)],
            "loss_written": loss_of_written(model, tokens, written),
        }
    )


def _means(judged: pd.DataFrame, module: Module, topic: str) -> dict[str, float]:
    loss = float(judged["loss_written"].mean())
    return {
        "module_share": float((judged["module"] == module.index).mean()),
        "module_score": float(judged["module_score"].mean()),
        "topic_share": float((judged["topic"] == topic).mean()),
        "topic_probability": float(judged["topic_probability"].mean()),
        "loss_written": loss,
        "perplexity_written": float(np.exp(loss)),
    }
