"""Full scale attention (FUSA) for lesions on CT slices, in JAX and Flax."""

from fusa_jax.fusa import FUSA

__all__ = ['FUSA']
