"""Full scale attention (FUSA) for lesions on CT slices, in JAX and Flax."""

__all__ = ['FUSA', 'load']


def __getattr__(name):
  # Imports on first use (PEP 562): importing JAX takes two seconds, and --help and flag errors do not need it.
  if name == 'FUSA':
    from fusa_jax.fusa import FUSA

    return FUSA
  if name == 'load':
    from fusa_jax.inference.predictor import load_predictor

    return load_predictor
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
