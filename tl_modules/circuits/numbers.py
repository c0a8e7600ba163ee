"""The numbers behind a circuit, prompt by prompt."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pandas as pd
from jaxtyping import Float

from tl_modules._checks import refuse
from tl_modules.attribution.scores import Scores
from tl_modules.circuits.asked import Asked
from tl_modules.circuits.edges import Edges, Wanted
from tl_modules.circuits.nodes import Plan, summary


class CircuitNumbers:
    """Scores and edges of each prompt, by node.

    Args:
        asked: what is explained.
        texts: the prompts.
        plan: the nodes.
        wanted: the nodes, as the edges were computed for.
        edges: the edges of each prompt.
        scores: of all heads, units and modules.
    """

    def __init__(
        self, asked: Asked, texts: list[str], plan: Plan, wanted: Wanted, edges: Edges, scores: Scores
    ) -> None:
        self.asked, self.texts, self.plan, self.wanted = asked, texts, plan, wanted
        self.edges_by_prompt, self._scores = edges, scores

    @property
    def tokens(self) -> list[str]:
        """The tokens of the prompt; empty where there are several prompts."""
        return self.plan.tokens

    @property
    def n_prompts(self) -> int:
        """How many prompts are explained."""
        return len(self._scores.targets)

    @property
    def values(self) -> Float[np.ndarray, " prompt"]:
        """The target of each prompt."""
        return self.edges_by_prompt.value.double().cpu().numpy()

    @cached_property
    def matrix(self) -> Float[np.ndarray, "receiver sender prompt"]:
        """The edges of each prompt: rows as `receivers`, columns as `nodes` without the target."""
        return self.plan.matrix(self.edges_by_prompt)

    @cached_property
    def receivers(self) -> list[str]:
        """The ids of the nodes that edges lead to, in the order of the matrix."""
        table = self.plan.table()
        own = [table.loc[table["kind"] == "target", "id"], table.loc[table["kind"] == "head", "id"]]
        return [*pd.concat(own), *table.loc[table["kind"].isin(["module", "other"]), "id"]]

    def head_scores(self) -> Float[np.ndarray, "prompt layer head"]:
        """The score of every head, by the method asked for."""
        return self._scores.tensor("head")[:, :, 0].double().cpu().numpy()

    def gradient_scores(self) -> Float[np.ndarray, "sender prompt"]:
        """Of each sender: that of the plain gradient, over all paths."""
        plan, edges = self.plan, self.edges_by_prompt
        bands = np.array([plan.band_of(layer) for layer in range(plan.n_layers)])
        by_band = np.eye(len(plan.starts))[bands]
        heads = edges.head_scores.double().cpu().numpy()
        own = [heads[:, layer, head] for layer, head in plan.heads]
        rest = (heads.sum(-1) @ by_band).T
        for (layer, _), score in zip(plan.heads, own, strict=True):
            rest[plan.band_of(layer)] -= score
        groups = np.zeros((plan.n_groups, self.n_prompts))
        for group, scores in zip(self.wanted.groups, edges.unit_scores, strict=True):
            np.add.at(groups, group.numpy(), scores.double().cpu().numpy().T)
        embedding = self.matrix[:, : max(1, len(plan.tokens))].sum(0)
        errors = edges.errors.double().sum(0).cpu().numpy() @ by_band
        return np.concatenate([embedding, *[score[None] for score in own], rest, groups, errors.T])

    def module_scores_by_prompt(self) -> Float[np.ndarray, "module prompt"]:
        """The score of every module, over all bands."""
        width = len(self.plan.names) + 1
        start = max(1, len(self.tokens)) + len(self.plan.heads) + len(self.plan.starts)
        groups = self.gradient_scores()[start : start + self.plan.n_groups]
        return groups.reshape(len(self.plan.starts), width, -1).sum(0)[:-1]

    def module_labels(self) -> list[np.ndarray]:
        """The module of each unit, -1 for none, by place."""
        width = len(self.plan.names) + 1
        found = [group.numpy() % width for group in self.wanted.groups]
        return [np.where(labels == width - 1, -1, labels) for labels in found]

    @cached_property
    def unit_table(self) -> pd.DataFrame:
        """All units, as in `units()` but without what they promote."""
        parts = []
        for place, labels, scores, values in zip(
            self.wanted.places,
            self.module_labels(),
            self.edges_by_prompt.unit_scores,
            self.edges_by_prompt.unit_values,
            strict=True,
        ):
            units = place.site.units()[["label", "layer", "index"]]
            numbers = summary(scores.double().cpu().numpy().T)
            parts.append(units.assign(module=labels, value=values.double().mean(0).cpu().numpy(), **numbers))
        table = pd.concat(parts, ignore_index=True)
        return table[["module", "label", "layer", "index", "value", "score", "standard_error", "consistency"]]

    def one_prompt(self) -> str:
        """The prompt.

        Raises:
            InputError: there are several.
        """
        if self.n_prompts > 1:
            cure = "Make a view of one prompt for this."
            refuse("view", got=f"{self.n_prompts} prompts", want="one", cure=cure)
        return self.texts[0]
