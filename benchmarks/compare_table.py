"""The table of benchmarks/compare.py, in its own module because the accelerator's report must not need PyTorch."""


def table(rows: list[dict]) -> str:
  """Returns Markdown. A ratio above 1 means faster than eager PyTorch."""
  lines = [
    '| model | framework | training: slices/s | ratio | GFLOP/s | peak MB | inference: slices/s | ratio | GFLOP/s |',
    '| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |',
  ]
  for row in rows:
    numbers = [
      f'{row["train_slices_per_second"]:.2f}',
      f'{row["train_ratio_to_eager"]:.2f}',
      f'{row["train_gflops_per_second"]:.0f}',
      f'{row["train_peak_bytes"] / 1e6:.0f}',
      f'{row["inference_slices_per_second"]:.2f}',
      f'{row["inference_ratio_to_eager"]:.2f}',
      f'{row["inference_gflops_per_second"]:.0f}',
    ]
    lines.append('| ' + ' | '.join([f'`{row["model"]}`', row['framework'], *numbers]) + ' |')
  return '\n'.join(lines)
