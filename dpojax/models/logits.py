"""Final hidden states -> float32 logits, or one float32 number.

Legend: V vocabulary, D model, T tokens.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpojax.models.attention.blocks import matmul_precision
from dpojax.models.config import ModelConfig
from dpojax.models.params import SCALAR_HEAD
from dpojax.models.quantise import in_compute


def head_params(config: ModelConfig) -> tuple[str, ...]:
    """The names of the parameters that read hidden states: the matrix to logits, then its bias; or
    the map to one number.
    """
    if config.scalar_head:
        return (SCALAR_HEAD,)
    if config.tie_embeddings:
        return ("embed",)
    if config.head_bias:
        return ("unembed", "unembed_bias")
    return ("unembed",)


def make_unembed(
    config: ModelConfig, dtype: jnp.dtype, constrain: Callable[[Array], Array]
) -> Callable[[Any, Array], Array]:
    """The function (head, hidden [..., D]) -> float32 logits [..., V].

    Args:
      dtype: of the product's operands.
      constrain: applied to the logits, to keep their vocabulary spread over the mesh.
    """
    if config.scalar_head:
        return _no_logits
    matrix_name = head_params(config)[0]
    equation = "...D,DV->...V"
    if config.tie_embeddings:
        equation = "...D,VD->...V"
    cap = config.logits_softcap

    def unembed(head, hidden):
        matrix = in_compute(head[matrix_name], dtype)
        # float32 out: a log-sum-exp over the vocabulary loses too much in bf16
        logits = constrain(logits_product(equation, hidden, matrix))
        if config.head_bias:
            logits = logits + head["unembed_bias"].astype(jnp.float32)
        if cap is None:
            return logits
        return cap * jnp.tanh(logits / cap)

    return unembed


def _no_logits(head, hidden):
    raise ValueError("a model with a scalar head has no logits")


def read_scalar(head: Any, hidden: Float[Array, "*T D"]) -> Float[Array, "*T"]:
    """The scalar head's number of every hidden state: a reward, or a value.

    Float32 in every dtype of the computation: rewards of two responses are subtracted.
    """
    weight = head[SCALAR_HEAD].astype(jnp.float32)
    return jnp.einsum(
        "...D,D->...", hidden.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def logits_product(equation: str, hidden: Array, matrix: Array) -> Float[Array, "*T V"]:
    """einsum(equation, hidden, matrix), float32 out of operands in the dtype of the computation.

    The backward pass has its products in that dtype too, with float32 sums: JAX would take float32
    operands, since the cotangent is one.
    """
    return jnp.einsum(equation, hidden, matrix, preferred_element_type=jnp.float32)


def _logits_product_fwd(equation, hidden, matrix):
    return logits_product(equation, hidden, matrix), (hidden, matrix)


def _logits_product_bwd(equation, kept, cotangent):
    hidden, matrix = kept
    inputs, out = equation.split("->")
    of_hidden, of_matrix = inputs.split(",")
    cotangent = cotangent.astype(matrix.dtype)
    product = functools.partial(
        jnp.einsum, precision=matmul_precision(matrix.dtype), preferred_element_type=jnp.float32
    )
    d_hidden = product(f"{out},{of_matrix}->{of_hidden}", cotangent, matrix)
    flat = {
        of_hidden[-1]: hidden.reshape(-1, hidden.shape[-1]),
        out[-1]: cotangent.reshape(-1, cotangent.shape[-1]),
    }
    first, second = of_matrix  # in the order of the result, which then needs no transpose
    d_matrix = product(f"T{first},T{second}->{of_matrix}", flat[first], flat[second])
    return d_hidden.astype(hidden.dtype), d_matrix.astype(matrix.dtype)


logits_product.defvjp(_logits_product_fwd, _logits_product_bwd)
