"""python run.py SLICES.npy PROBABILITY.npy{{ ' ' ~ arguments | join(' ') if arguments }}: runs this bundle with jax and NumPy. README.md describes the arrays."""

import hashlib
import json
import pathlib
import sys

import jax
import numpy as np
from jax import export

bundle = json.loads((pathlib.Path(__file__).parent / 'bundle.json').read_text())
files = {name: (pathlib.Path(__file__).parent / name).read_bytes() for name in bundle['sha256']}
for name, content in files.items():
  if hashlib.sha256(content).hexdigest() != bundle['sha256'][name]:
    sys.exit(f'error: {name} changed since the export; copy the bundle again')
# safetensors: 8 bytes with the length of the header, the header as JSON, then the arrays; all little-endian.
start = 8 + int.from_bytes(files['weights.safetensors'][:8], 'little')
header, arrays = json.loads(files['weights.safetensors'][8:start]), files['weights.safetensors'][start:]
array = lambda about: np.frombuffer(arrays[slice(*about['data_offsets'])], '<f4').reshape(about['shape'])
weights = jax.device_put({name: array(about) for name, about in header.items()})
probability = jax.jit(export.deserialize(bytearray(files['model.stablehlo'])).call)
slices, size, results = np.rint(np.load(sys.argv[1])).astype(np.int16), bundle['batch_size'], []
# % if context.slices
# The channels of each slice: the slice in the middle, and its neighbours. A missing one repeats the next to the middle.
most, spacing = bundle['context'], np.float32(sys.argv[3])
reach = sum(step * spacing <= most['mm'] * 1.001 for step in range(1, most['slices'] + 1))
offsets = np.arange(-most['slices'], most['slices'] + 1).clip(-reach, reach)
channels = (np.arange(len(slices))[:, None] + offsets).clip(0, len(slices) - 1)
# % endif
for begin in range(0, len(slices), size):
  # % if context.slices
  part = np.moveaxis(slices[channels[begin : begin + size]], 1, -1)
  # % else
  part = slices[begin : begin + size]
  # % endif
  filled = np.concatenate([part, part[:1].repeat(size - len(part), axis=0)])  # one shape: compiles once
  results.append(np.asarray(probability(weights, filled))[: len(part)])
np.save(sys.argv[2], np.concatenate(results))
# % if has_values
# The mask: bit k of a pixel is class k, and mask_values has the value of a pixel by its bits.
points = list(bundle['operating_point'].get('classes', {'': bundle['operating_point']}).values())
of_each = np.moveaxis(np.concatenate(results).reshape(*slices.shape, len(points)), -1, 0)
bits = sum((each >= point['threshold']) * (1 << k) for k, (each, point) in enumerate(zip(of_each, points, strict=True)))
values = np.array(bundle['mask_values'])
# % if context.slices
path = sys.argv[4]
# % else
path = sys.argv[3]
# % endif
np.save(path, values.astype(np.min_scalar_type(values.max()))[bits])
# % endif
