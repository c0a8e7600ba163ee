"""Point clouds: checked, in principal coordinates, and Gaussian ones with the same mean and covariance."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from tl_modules._checks import refuse

Points = Float[np.ndarray, "unit dimension"]


def as_points(argument: str, points: Any, least: int = 2) -> Points:
    """Points as float64, one a row; a list of numbers is a cloud on a line.

    Raises:
        InputError: not numbers, fewer than `least`, or some that are not finite.
    """
    if isinstance(points, Tensor):
        points = points.detach().double().cpu().numpy()
    try:
        cloud = np.asarray(points, dtype=np.float64)
    except (TypeError, ValueError):
        refuse(argument, got=f"a {type(points).__name__}", want="numbers, one row a point")
    cloud = cloud[:, None] if cloud.ndim == 1 else cloud
    if cloud.ndim != 2 or len(cloud) < least or cloud.shape[1] < 1:
        refuse(argument, got=f"the shape {cloud.shape}", want=f"[point, dimension], {least} points or more")
    if not np.isfinite(cloud).all():
        refuse(argument, got="numbers that are not finite", want="finite ones", cure="Leave those rows out.")
    return cloud


def principal_coordinates(
    points: Points, n_dimensions: int, *, standardize: bool = False
) -> tuple[Float[np.ndarray, "unit kept"], Float[np.ndarray, " kept"], float]:
    """Coordinates along the first principal axes, their variances, and the share of variance they hold.

    Raises:
        InputError: the points span fewer dimensions.
    """
    centred = points - points.mean(0)
    if standardize:
        spread = centred.std(0)
        centred = centred[:, spread > 0] / spread[spread > 0]
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    rank = int((singular > singular.max(initial=0.0) * 1e-10).sum())
    if rank < n_dimensions:
        want = f"{n_dimensions}, the dimensions asked for, or more"
        refuse("points", got=f"points that span {rank} dimensions", want=want, cure="Lower n_dimensions.")
    used = left[:, :n_dimensions] * singular[:n_dimensions]
    explained = float((singular[:n_dimensions] ** 2).sum() / (singular**2).sum())
    return used, singular[:n_dimensions] ** 2 / (len(points) - 1), explained


def gaussian_like(points: Points, rng: np.random.Generator) -> Points:
    """Gaussian points, as many, with exactly the sample mean and sample covariance of these.

    Given its mean and covariance a Gaussian sample is a uniformly random frame, sheared; that is drawn here.
    There must be more points than dimensions.
    """
    n, d = points.shape
    noise = rng.normal(size=(n, d))
    frame, _ = np.linalg.qr(noise - noise.mean(0))
    _, singular, axes = np.linalg.svd(points - points.mean(0), full_matrices=False)
    return points.mean(0) + (frame * singular) @ axes
