"""The gradient with respect to units, from that with respect to the activation that they act on."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tl_modules.bases import HeadSite
from tl_modules.sites import Activation, Site
from tl_modules.unit_values import Components


def component_gradients(
    site: Site, values: Components, output: Activation, gradients: Float[Tensor, row * activation]
) -> Float[Tensor, "row batch pos unit component"]:
    """Gradients with respect to the units' values, or to the z of each head.

    Args:
        site: whose units.
        values: as `read_components` gives them.
        output: the activation at `site.write_name`.
        gradients: of one or more targets, there.
    """
    if isinstance(site, HeadSite):
        return gradients.reshape(len(gradients), *values.shape)
    now = values[..., 0].detach()
    with torch.enable_grad():
        new = now.clone().requires_grad_()
        edited = site.edited(output.detach(), now, new)
        (found,) = torch.autograd.grad(edited, new, gradients.to(edited), is_grads_batched=True)
    return found[..., None]
