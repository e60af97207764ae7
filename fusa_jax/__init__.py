"""Full scale attention (FUSA) for lesions on CT slices, in JAX and Flax."""

__all__ = ['FUSA']


def __getattr__(name):
  # What reads flags or refuses a command should not wait two seconds for JAX (PEP 562).
  if name in __all__:
    from fusa_jax.fusa import FUSA

    return FUSA
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
