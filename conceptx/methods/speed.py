"""SPEED, Scalable, Precise and Efficient Concept Erasure (Li et al. 2026, arXiv 2503.07392)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from conceptx.concept import Concept
from conceptx.edit import Edit, LowRank
from conceptx.eraser import Eraser, all_names, as_concepts, check_roles, provenance
from conceptx.geometry import WeightedRows, capped, weighted_dual
from conceptx.geometry.arrays import gram
from conceptx.geometry.null_space import outside, principal_directions, quiet_directions
from conceptx.methods.uce import UCE
from conceptx.models import DiffusionModel
from conceptx.models.token_rows import EMPTY, TokenRows, Tokens
from conceptx.progress import track
from conceptx.settings import require_choices, require_positive, tunable
from conceptx.words import whole_words

Projections = Literal["values", "keys", "both"]
ENDS = {"values": ("to_v",), "keys": ("to_k",), "both": ("to_k", "to_v")}
ERASE_ONLY_RIDGE = 1.0  # of the unconstrained edit (Eq. 5)
FULFILLED = 1e-10  # of the size of C2: what is left of it in the null space is no constraint but rounding


@dataclass(frozen=True)
class SPEED(Eraser):
    """Erase in the null space of what is kept, value matrix by value matrix, in closed form (arXiv 2503.07392).

    Eqs. 11-12: with C the rows of the concepts, C* those of their anchors, P the projection onto the directions in
    which the refined retained rows have next to nothing, and C2 rows that must not change, W' = W + Delta P minimises

        |(W + Delta P) C - W C*|^2 / concepts + ridge |Delta P|^2   subject to   Delta P C2 = 0.

    The retained rows are refined for each matrix, since a large set would leave no null space:
    - filter (IPF, Eqs. 5-6): of the retained rows those stay that the unconstrained edit would move by more than
      filter_scale times the mean;
    - augmentation (DPA, Eqs. 7-9): each is joined by random steps in the directions that W hardly reads; of these,
      too, only those stay that the unconstrained edit would move more than the mean of them;
    - constraint (IEC, Eq. 10): C2 are the beginning token's row and the k-means centroids of the empty prompt's others.

    projections:    which matrices change: "values" (published), "keys" or "both".
    tokens:         which rows of a prompt are C, and of a retained name C0: "last" (published), "last+rest" or "all"
                    (the code, for nudity).
    null_threshold: tau. A direction is free when the mean square of the refined rows along it is below this.
    ridge:          s (the code's retain_scale); a SMALLER value erases harder.
    equality_slack: lambda; 0: C2 does not change at all.
    filter:         whether the retained names are filtered; their augmentations always are.
    filter_scale:   of the mean, in both filters.
    augmentations:  N_A, steps for each retained row; 0: none.
    directions:     r, the number of right-singular directions of W with the smallest singular values that steps go in.
    centroids:      how many.

    Retained are the rows of the concepts' `retain`, without names that contain an erased name as whole words
    (recorded as `left_out`); where none is left, the rows of the empty prompt behind its beginning token. Settings for
    each task are in docs/speed.md; the defaults are those for instances and styles.

    Differs from the authors' code: the singular directions are those of the whole W, its null space included, where
    they take the last non-zero one (of a larger null space what it has of the retained rows' principal directions); the
    mean of the second filter is over all steps, where theirs is over each chunk of 128 shuffled rows, so that nothing
    depends on the order of names; augmented rows are never formed; everything is in float64; an empty anchor is the
    end-of-text row (theirs: the beginning token's, which IEC freezes); a constraint that the null space already fulfils
    is left out, where their matrix is singular. As in the code, sums over concepts are means: the paper's ridge is
    ridge times the number of concepts.
    """

    projections: Projections = "values"
    tokens: Tokens = "last"
    null_threshold: float = tunable(0.1, 0.001, 1.0, log=True)  # τ
    ridge: float = tunable(1.0, 0.01, 100.0, log=True)  # s
    equality_slack: float = 0.0  # λ
    filter: bool = True
    filter_scale: float = tunable(1.0, 0.25, 4.0, log=True)
    augmentations: int = 10  # N_A
    directions: int = 1  # r
    centroids: int = 3  # k

    def __post_init__(self) -> None:
        require_choices(self)
        require_positive(self, "null_threshold", "ridge")
        if wrong := [name for name in ("equality_slack", "filter_scale") if not 0 <= getattr(self, name) < math.inf]:
            raise ValueError(f"{', '.join(wrong)} must be zero or positive, and finite.")
        least = {"augmentations": 0, "directions": 1, "centroids": 1}
        if wrong := [name for name, bound in least.items() if getattr(self, name) < bound]:
            raise ValueError(f"{wrong[0]} must be at least {least[wrong[0]]}, got {getattr(self, wrong[0])}.")

    def erase(self, model: DiffusionModel, concept: Concept | Sequence[Concept], *, seed: int = 0) -> Edit:
        """The edit that erases all the concepts at once: a low-rank change of each matrix, one rank a row of C.

        seed: of the augmentation's steps and of the k-means starts.
        Raises ValueError where `UCE.erase` does, and for a pipeline that has no keys and values of the text (SD 3,
        FLUX, or behind an `encoder_hid_proj`); the model stays as it is.
        """
        self._accept(model)
        concepts = as_concepts(concept)
        check_roles(concepts)
        names = self._matrices(model)
        kept, left_out = retained_names(concepts)
        task = self._task(model, concepts, kept, seed)
        deltas = {}
        for name in track(names, "matrix by matrix"):
            weight = model.parameter(name)
            assert weight is not None  # only biases may be absent
            deltas[name] = LowRank(*self.change(weight.detach().to("cpu", torch.float64), task))
        record = provenance(self, concepts, seed, left_out=left_out, retained_rows=len(task.retained))
        return Edit(model.fingerprint, deltas=deltas, provenance=(record,))

    def _matrices(self, model: DiffusionModel) -> list[str]:
        """The parameters to change."""
        found = [f"{path}.weight" for path in model.projections if path.endswith(ENDS[self.projections])]
        if not found:
            readers = ", ".join(model.projections)
            raise ValueError(f"SPEED edits keys or values of cross-attention; here only {readers} reads the text.")
        if self.directions >= (width := model.width("text")):
            raise ValueError(f"directions must be below the width of the text, {width}, got {self.directions}.")
        return found

    def _task(self, model: DiffusionModel, concepts: Sequence[Concept], kept: Sequence[str], seed: int) -> Task:
        """All rows; short prompts without their padding where only last rows are asked for."""
        pairs = [pair for concept in concepts for pair in UCE().pairs(concept)]
        named = [(name, name) for name in kept]
        phrases = [*(phrase for pair in pairs for phrase in pair), *named]
        encoded = TokenRows.of(model, phrases, trimmed=self.tokens == "last")
        blocks = [encoded.aligned(pair, self.tokens) for pair in pairs]
        keys, anchors = (torch.cat([block[number] for block in blocks]).cpu().double() for number in (0, 1))
        begin, others = empty_prompt(model)
        retained = torch.cat([encoded.rows(name, self.tokens) for name in named]).cpu().double() if named else others
        invariants = torch.cat([begin, centroids(others, self.centroids, seed)])
        return self.task(keys, anchors, retained, invariants, concepts=len(concepts), seed=seed)

    def task(
        self, keys: Tensor, anchors: Tensor, retained: Tensor, invariants: Tensor, *, concepts: int = 1, seed: int = 0
    ) -> Task:
        """What all matrices share of rows (k, d), (k, d), (n, d) and (c, d), in float64 on the CPU."""
        weighted = WeightedRows.of(keys, 1 / concepts)
        generator = torch.Generator().manual_seed(seed)
        steps = torch.randn(len(retained), self.augmentations, self.directions, generator=generator).double()
        read = weighted_dual(weighted, None, ERASE_ONLY_RIDGE)
        loudest = principal_directions(retained, self.directions)
        return Task(weighted, anchors, retained, invariants, steps, read, retained @ read.T, loudest)

    def change(self, weight: Float[Tensor, "out d"], task: Task) -> tuple[Tensor, Tensor]:
        """(up (out, k), down (k, d)) of Delta P for one matrix."""
        up = weight @ (task.anchors - task.keys.rows).T
        directions = quiet_directions(weight, task.loudest)
        refined = self.refined(task, gram(up), directions)
        free = outside(refined, torch.cat([task.keys.rows, task.invariants]), self.null_threshold)
        keys, invariants = free.split([len(task.anchors), len(task.invariants)])
        return capped(up, self._read(WeightedRows(keys, task.keys.weights), invariants, task))

    def refined(
        self, task: Task, moved: Float[Tensor, "k k"], directions: Float[Tensor, "r d"]
    ) -> Float[Tensor, "m d"]:
        """Rows whose second moments are the mean outer product of the refined retained rows of one matrix.

        moved: D'D for what the matrix makes of anchors minus concepts, D (out, k); |D L c| is how far c would move. Of
        c + g p only L c and L p are needed, so no step is formed.
        """
        across = task.coordinates @ moved
        squares = (across * task.coordinates).sum(1)
        kept = self._above(squares) if self.filter else torch.ones_like(squares, dtype=torch.bool)
        aside, steps = directions @ task.read.T, task.steps[kept]
        cross = (steps * (across[kept] @ aside.T)[:, None]).sum(-1)
        joined = self._above(squares[kept, None] + 2 * cross + ((steps @ (aside @ moved @ aside.T)) * steps).sum(-1))
        return mean_moments(task.retained[kept], steps, joined, directions)

    def _above(self, squares: Tensor) -> Bool[Tensor, ...]:
        shifts = squares.clamp(min=0).sqrt()
        return shifts >= self.filter_scale * shifts.mean()

    def _read(self, keys: WeightedRows, invariants: Float[Tensor, "c d"], task: Task) -> Float[Tensor, "k d"]:
        """J - J C2 (C2'P M C2 + lambda I)^-1 C2'P M, J = C'P M the keys' dual, for rows that P was applied to."""
        dual = weighted_dual(keys, None, self.ridge)
        sizes, basis = torch.linalg.svd(invariants, full_matrices=False)[1:]
        some = sizes > FULFILLED * torch.linalg.vector_norm(task.invariants)
        sizes, basis = sizes[some], basis[some]
        solved = (basis - (basis @ dual.T) @ keys.rows) / self.ridge  # C2'P M by Woodbury
        inner = basis @ solved.T + torch.diag(self.equality_slack / sizes.square())
        return dual - (dual @ basis.T) @ torch.linalg.solve(inner, solved)


@dataclass(frozen=True, eq=False)
class Task:
    """What all matrices share: float64, on the CPU.

    keys: C, each weighted 1 / concepts.  anchors: C*.  retained: C0.  invariants: C2.
    steps:       the augmentation's coordinates in the directions of a matrix, standard normal.
    read:        L of the unconstrained edit.  coordinates: L c of the retained rows.
    loudest:     the directions in which the retained rows have most energy.
    """

    keys: WeightedRows
    anchors: Float[Tensor, "k d"]
    retained: Float[Tensor, "n d"]
    invariants: Float[Tensor, "c d"]
    steps: Float[Tensor, "n a r"]
    read: Float[Tensor, "k d"]
    coordinates: Float[Tensor, "n k"]
    loudest: Float[Tensor, "r d"]


def mean_moments(
    rows: Float[Tensor, "n d"],
    steps: Float[Tensor, "n a r"],
    joined: Bool[Tensor, "n a"],
    directions: Float[Tensor, "r d"],
) -> Float[Tensor, "m d"]:
    """n + r rows F with F'F the mean outer product of the rows and of row i + steps[i, j] @ directions where joined.

    The steps of a row are their mean, which shifts it, and what is left, which is the same r directions for all rows.
    """
    given = steps * joined[..., None]
    counts = 1 + joined.sum(1, keepdim=True).to(rows)
    means = given.sum(1) / counts
    values, vectors = torch.linalg.eigh(gram(given.flatten(0, 1)) - means.T @ (counts * means))
    total = counts.sum().clamp(min=1)
    weights = (counts / total).sqrt()
    found = torch.cat([rows, directions])
    found[: len(rows)].mul_(weights).addmm_(weights * means, directions)
    found[len(rows) :] = (vectors * (values.clamp(min=0) / total).sqrt()).T @ directions
    return found


def retained_names(concepts: Sequence[Concept]) -> tuple[list[str], list[str]]:
    """(sorted names to retain, names left out because they contain an erased one as whole words)"""
    erased, names = whole_words(*(concept.name for concept in concepts)), sorted(all_names(concepts, "retain"))
    out = [name for name in names if erased.search(name)]
    return [name for name in names if name not in out], out


def empty_prompt(model: DiffusionModel) -> tuple[Tensor, Tensor]:
    """The beginning token's row (1, d) of the empty prompt, and all behind it."""
    encoded = TokenRows.of(model, [EMPTY])
    block, others = (rows.cpu().double() for rows in (encoded.block(EMPTY), encoded.rows(EMPTY, "all")))
    return block[: len(block) - len(others)], others


def centroids(rows: Float[Tensor, "n d"], count: int, seed: int) -> Float[Tensor, "count d"]:
    """The k-means centroids (Euclidean, the best of ten starts)."""
    from sklearn.cluster import KMeans

    found = KMeans(n_clusters=count, n_init=10, random_state=seed).fit(rows.numpy())
    return torch.from_numpy(found.cluster_centers_)
