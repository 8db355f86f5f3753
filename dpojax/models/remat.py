"""What a layer's backward pass finds kept, and what it computes
again: the choices of model.remat.
"""

import jax

from dpojax.models.attention.blocks import SAVED

_SAVE = jax.checkpoint_policies

LAYER_INPUT = "layer_input"


def _offload(names: list[str]):
    """Keeps what goes by these names, in the host's memory until the backward pass."""
    return _SAVE.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=names,
        offload_src="device",
        offload_dst="pinned_host",
    )


_named = _SAVE.save_only_these_names(SAVED)

_dots_in_host = _SAVE.offload_dot_with_no_batch_dims("device", "pinned_host")


def _attention(prim, *args, **params):
    """What attention's backward pass needs of its forward pass.

    It is kept by name, or is cuDNN's, whose results jax gives no name.
    """
    return prim.name.startswith("dot_product_attention_fwd") or _named(prim, *args, **params)


def _attention_and_offloaded_dots(prim, *args, **params):
    return _attention(prim, *args, **params) or _dots_in_host(prim, *args, **params)


REMAT = {
    "none": None,  # everything is kept
    "full": _SAVE.nothing_saveable,  # a layer's input alone is kept
    "full_offload": _offload([LAYER_INPUT]),  # and in the host's memory
    # attention alone is kept besides a layer's input: the projections are computed again, the
    # scores are not
    "attention": _attention,
    # matrix products of the projections, and attention: what is left is cheap to compute again
    "dots": _SAVE.save_from_both_policies(_SAVE.dots_with_no_batch_dims_saveable, _attention),
    "dots_offload": _attention_and_offloaded_dots,  # attention stays on the device
}
