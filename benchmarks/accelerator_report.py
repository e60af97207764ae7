"""The report of benchmarks/accelerator.py: derived numbers and tables."""

import re

from benchmarks import compare_table

# TFLOP/s of dense bfloat16 matrix products, without sparsity, from the manufacturers' data sheets. The first pattern
# that matches the device's name counts. T4 and V100 have no bfloat16.
PEAK_TFLOPS = {
  r'GB200|B200': 2250,
  r'GH200': 989,
  r'H200 NVL|H100 NVL': 835,
  r'H200': 989,
  r'H100 PCIe': 756,
  r'H100': 989,
  r'A100|A800': 312,
  r'A10G': 70,
  r'A10\b': 125,
  r'A30': 165,
  r'A40': 150,
  r'L40S': 362,
  r'L40\b': 181,
  r'L4\b': 121,
  r'TPU v5 lite|TPU v5e': 197,
  r'TPU v5': 459,
  r'TPU v6': 918,
  r'TPU v4': 275,
}


def mfu(gflops_per_second: float, kind: str) -> float | None:
  """Returns model FLOP utilisation: the model's FLOP/s / the device's published peak; None if the peak is unknown."""
  peak = peak_tflops(kind)
  return None if peak is None else gflops_per_second / (1e3 * peak)


def peak_tflops(kind: str) -> float | None:
  """Returns the device's peak by its name; None if it is not in PEAK_TFLOPS."""
  return next((peak for pattern, peak in PEAK_TFLOPS.items() if re.search(pattern, kind)), None)


def finished(report: dict) -> dict:
  """Adds `to_training`: the input path's slices/s / slices/s of the fastest training step in JAX."""
  parts = report['parts']
  rates = [
    row['train_slices_per_second'] for row in parts.get('compare', {}).get('rows', ()) if row['framework'] == 'JAX'
  ]
  rates += [row['slices_per_second'] for row in parts.get('fusa_share', {}).get('rows', ()) if row['form'] != 'literal']
  if 'input_path' in parts and rates:
    parts['input_path']['to_training'] = parts['input_path']['slices_per_second'] / max(rates)
  return report


def markdown(report: dict) -> str:
  """Returns the report as Markdown tables and sentences."""
  parts, settings = report['parts'], report['settings']
  lines = [
    f'Device {report["device"]}, {report["date"]}, commit {(report["commit"] or "unknown")[:7]}, '
    + ', '.join(f'{name} {version}' for name, version in report['versions'].items() if version)
    + f'; {settings["image_size"]} x {settings["image_size"]}, batch {settings["batch_size"]}'
    + (f', width {settings["width"]}' if settings['width'] else '')
    + f'; {sum(report["seconds"].values()):.0f} s.'
  ]
  for name in ('compare', 'torch_compile'):
    if name in parts:
      rows = parts[name]['rows']
      shares = ', '.join(f'`{row["model"]}` {row["framework"]} {_percent(row["train_mfu"])}' for row in rows)
      lines += [compare_table.table(rows), f'MFU in training: {shares}.']
  if 'fusa_share' in parts:
    head = "| model | form | step ms | slices/s | FUSA's share | peak MB | MFU |\n| --- | --- |" + ' ---: |' * 5
    cells = [
      f'| `{row["model"]}` | {row["form"]} | {row["step_seconds"] * 1e3:.2f} | {row["slices_per_second"]:.1f} '
      f'| {_percent(row["share"])} | {row["peak_bytes"] / 1e6:.0f} | {_percent(row["mfu"])} |'
      for row in parts['fusa_share']['rows']
    ]
    lines.append('\n'.join([head, *cells]))
  if 'largest_batch' in parts:
    part = parts['largest_batch']
    used = f', {part["fits_bytes"] / 1e6:,.1f} MB' if part['fits_bytes'] else ''
    beyond = f'{part["too_large"]} does not fit' if part['too_large'] else 'larger batches were not tried'
    lines.append(
      f'Largest batch of `{part["model"]}`: {part["fits"] or "none"}{used} of {part["limit_bytes"] / 1e6:,.1f} MB; '
      f'{beyond}.'
    )
  if 'input_path' in parts:
    part = parts['input_path']
    times = part.get('to_training')
    beside = f', {times:.2f} times the fastest training step' if times else ''
    lines.append(f'Input path: {part["slices_per_second"]:.0f} slices/s{beside}.')
  if 'prediction' in parts:
    part = parts['prediction']
    again = f', then {part["seconds"]:.1f} s' if 'seconds' in part else ''
    lines.append(
      f'Prediction of {part["slices"]} slices by `{part["model"]}`, from file to mask: {part["first_seconds"]:.1f} s '
      f'with compiling{again} ({part["slices_per_second"]:.0f} slices/s); reading only '
      f'{part["reading_seconds"]:.1f} s.'
    )
  if 'profile' in parts:
    part = parts['profile']
    head = f'| kernel of `{part["model"]}`, {part["steps"]} steps | ms | calls | share |\n| --- |' + ' ---: |' * 3
    cells = [
      f'| `{row["kernel"][:80]}` | {row["seconds"] * 1e3:.2f} | {row["calls"]} | {_percent(row["share"])} |'
      for row in part['rows']
    ]
    lines.append('\n'.join([head, *cells]))
  lines += [f'Incomplete part {name}: {reason}.' for name, reason in report['not_whole'].items()]
  return '\n\n'.join(lines)


def _percent(share):
  return '-' if share is None else f'{share:.1%}'
