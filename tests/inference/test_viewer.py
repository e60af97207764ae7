"""HTML pages of scans and masks: their contents, read with other libraries, and their display in a browser."""

import gzip
import hashlib
import io
import json
import os
import re
import urllib.parse

import browser
import dicom_series
import nibabel as nib
import numpy as np
import pytest
from nibabel import orientations
from PIL import Image
from viewer_page import Page

from fusa_jax.inference import viewer
from fusa_jax.scans import dicom
from fusa_jax.scans.classes import COLOURS
from fusa_jax.system import pages
from fusa_jax.system.errors import UserError

SHAPE = (32, 40, 12)  # from right to left, anterior to posterior, inferior to superior
# Voxels of 3 x 3 x 5 mm along L, P and S, and the position of the corner.
AFFINE = np.array([[-3.0, 0, 0, 50], [0, -3, 0, 60], [0, 0, 5, -200], [0, 0, 0, 1]])
SCORES = [0.01, 0.02, 0.4, 0.99, 0.9, 0.03, 0.04, 0.05, 0.6, 0.05, 0.05, 0.07]
POSITIVE = [3, 4, 8]
# The lesion, in the patient's right side at the back.
BOX = np.s_[5:11, 26:33, 3:5]
MARKER = 'Markername'


def stored(values, codes, affine=AFFINE):
  """Makes an image of an L, P, S volume with other axes and a patient's name in its header."""
  image = nib.Nifti1Image(values, affine)
  turn = orientations.ornt_transform(orientations.io_orientation(affine), orientations.axcodes2ornt(codes))
  image = image.as_reoriented(turn)
  image.header['descrip'], image.header['db_name'], image.header['aux_file'] = MARKER, MARKER, MARKER
  return image


def result(**changes):
  numbers = {'scan': 'x', 'model': 'fusa_resunet', 'step': 7, 'values': 'hu', 'threshold': 0.5, 'num_slices': SHAPE[2]}
  return {**numbers, 'lesion_ml': 1.26, 'positive_slices': POSITIVE, 'slice_scores': SCORES, **changes}


def hu():
  """Returns HU of a body in air, with lungs of two different values."""
  values = np.full(SHAPE, -1000, np.int16)
  values[4:28, 8:36] = 40
  values[6:14, 14:34] = -800
  values[18:26, 14:34] = -600
  values += np.arange(SHAPE[2], dtype=np.int16)
  values[16, 34] = 900  # bone: a scan without bone counts as windowed
  values[16, 34, 0] = 1000
  return values


def lesion():
  mask = np.zeros(SHAPE, np.uint8)
  mask[BOX] = 1
  mask[20:22, 20:22, 8] = 1
  return mask


def case(folder, name='a', codes='IPL', scan=None, mask=True, **changes):
  """Writes a scan to folder/in and its predictions to folder/out. Returns both folders."""
  for part in ('in', 'out'):
    (folder / part).mkdir(exist_ok=True)
  nib.save(stored(hu() if scan is None else scan, codes), folder / 'in' / f'{name}.nii.gz')
  if mask:
    nib.save(stored(lesion(), codes), folder / 'out' / f'{name}_mask.nii.gz')
  (folder / 'out' / f'{name}.json').write_text(json.dumps(result(**changes)))
  return folder / 'in', folder / 'out'


def test_a_page_holds_scan_and_mask_but_no_patient_name(tmp_path):
  source, masks = case(tmp_path)
  (path,) = viewer.view(source, masks)
  assert path == masks / 'a.html' and sorted(p.name for p in masks.iterdir()) == ['a.html', 'a.json', 'a_mask.nii.gz']
  page = Page(path)
  for name, values in (('scan', hu()), ('mask0', lesion())):
    volume = page.volume(name)
    np.testing.assert_array_equal(np.asarray(volume.dataobj), values)
    assert volume.get_data_dtype() == values.dtype
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    assert MARKER.encode() not in volume.to_bytes()
  assert MARKER not in path.read_text()
  assert 'For research only.' in page.text
  assert re.search(r'fusa_resunet, step 7, threshold 0\.5:\s+1\.3 mL of lesion,\s+3 of 12 slices positive', page.text)


def test_the_list_has_every_slice_from_superior_to_inferior(tmp_path):
  (path,) = viewer.view(*case(tmp_path))
  rows = [attributes for tag, attributes in Page(path).tags if tag == 'li']
  assert [int(row['data-slice']) for row in rows] == list(range(SHAPE[2]))[::-1]
  assert [int(row['data-slice']) for row in rows if 'positive' in row['class']] == POSITIVE[::-1]
  listed = re.findall(r'<span>(\d+)</span>.*?<span class="score[^"]*">([\d.]+)</span>', path.read_text())
  assert [(int(index), float(score)) for index, score in listed] == list(enumerate(SCORES))[::-1]


def test_a_page_loads_no_other_file(tmp_path):
  (path,) = viewer.view(*case(tmp_path))
  page = Page(path)
  assert not page.links
  (policy,) = (row['content'] for tag, row in page.tags if tag == 'meta' and 'http-equiv' in row)
  allowed = dict(rule.split(' ', 1) for rule in policy.split('; '))
  assert allowed.pop('default-src') == "'none'"
  assert set(' '.join(allowed.values()).split()) == {"'unsafe-inline'", 'data:'}
  *data, library, own = page.scripts.values()
  assert len(data) == 2 and len(library) > 100_000
  assert not re.search(r'https?:|fetch\(|import\b|XMLHttpRequest|WebSocket|\.src\b', own)
  assert not re.search(r'@import|url\(', path.read_text().split('<script', 1)[0])
  assert 'Copyright (c) 2021, Niivue' in page.text


def test_niivue_matches_the_digest_in_its_licence_file():
  folder = pages.TEMPLATES / 'niivue'
  digest = hashlib.sha256(gzip.decompress((folder / 'niivue.umd.js.gz').read_bytes())).hexdigest()
  assert digest in (folder / 'LICENSE.txt').read_text()


def test_several_scans_get_an_index_page(tmp_path):
  case(tmp_path, 'b c', step=[7, 9])  # predicted by two runs
  case(tmp_path, 'd', mask=False, positive_slices=[1, 2])
  numbers = json.loads((tmp_path / 'out' / 'd.json').read_text())
  del numbers['lesion_ml']  # as from a classifier
  (tmp_path / 'out' / 'd.json').write_text(json.dumps(numbers))
  source, masks = case(tmp_path)
  index, *written = viewer.view(source, masks)
  assert index.name == 'view.html' and [path.name for path in written] == ['a.html', 'b c.html', 'd.html']
  page = Page(index)
  assert page.links == ['a.html', 'b%20c.html', 'd.html'] and 'script' not in dict(page.tags)
  cells = re.findall(
    r'(a|b c|d)</a></th><td class="n">(.*?)</td><td class="n">(\d+)</td><td class="n">12</td>', index.read_text()
  )
  assert cells == [('a', '1.3', '3'), ('b c', '1.3', '3'), ('d', '', '2')]
  assert 'fusa_resunet, step 7, 9, threshold' in Page(written[1]).text
  without_mask = Page(written[2])
  assert 'mask0' not in without_mask.scripts and 'mL' not in without_mask.text
  np.testing.assert_array_equal(np.asarray(without_mask.volume('scan').dataobj), hu())


@pytest.mark.parametrize(
  'name', [b'M\xfcller', 'Mu\u0308ller 100% #1?'.encode(), b'a&b<c>'], ids=['latin-1', 'nfd', 'signs']
)
def test_links_find_pages_of_odd_names(tmp_path, name):
  source, masks = case(tmp_path, os.fsdecode(name))
  case(tmp_path)
  index, *written = viewer.view(source, masks)
  links = {os.fsdecode(urllib.parse.unquote_to_bytes(link)) for link in Page(index).links}
  assert links == {path.name for path in written} == {'a.html', f'{os.fsdecode(name)}.html'}


def test_a_dicom_series_is_shown_without_patient_names(tmp_path):
  source, masks = case(tmp_path)
  (source / 'a.nii.gz').unlink()
  folder = dicom_series.save(source / 'x', dicom_series.slices(hu(), AFFINE))
  (series,) = dicom.find_series(folder.iterdir())
  (masks / 'a.json').rename(masks / f'{series.name}.json')
  (masks / 'a_mask.nii.gz').rename(masks / f'{series.name}_mask.nii.gz')
  (path,) = viewer.view(source, masks)
  assert path.name == f'{series.name}.html'
  page = Page(path)
  np.testing.assert_array_equal(np.asarray(page.volume('scan').dataobj), hu())
  np.testing.assert_allclose(page.volume('scan').affine, AFFINE, atol=1e-4)
  content = path.read_bytes() + b''.join(page.volume(name).to_bytes() for name in ('scan', 'mask0'))
  for personal in (MARKER, *dicom_series.PERSONAL.values()):
    assert personal.encode() not in content


def test_grey_scans_have_their_own_window(tmp_path):
  grey = ((hu().astype(int) + 1000) // 8).astype(np.int16)
  (path,) = viewer.view(*case(tmp_path, scan=grey, values='grey'))
  page = Page(path)
  windows = [
    (row['data-centre'], row['data-width']) for tag, row in page.tags if tag == 'button' and 'data-centre' in row
  ]
  assert windows == [('127.5', '255')] and 'HU' not in page.text
  np.testing.assert_array_equal(np.asarray(page.volume('scan').dataobj), grey)


def test_all_missing_results_are_named_before_anything_is_written(tmp_path):
  for name in 'abcd':
    source, masks = case(tmp_path, name)
  (masks / 'a.json').unlink()
  (masks / 'b_mask.nii.gz').unlink()
  (masks / 'c.json').write_text((masks / 'c.json').read_text()[:-20])
  with pytest.raises(UserError) as caught:
    viewer.view(source, masks)
  first, second, third = str(caught.value).splitlines()
  assert first.startswith(f'{masks / "a.json"}: missing; run --mode=predict')
  assert second.startswith(f'{masks / "b_mask.nii.gz"}: missing; run --mode=predict')
  assert third.startswith(f'{masks / "c.json"}: damaged') and 'run --mode=predict' in third
  assert not list(masks.glob('*.html'))


@pytest.mark.parametrize(
  'changes',
  [
    {'slice_scores': SCORES[:-1]},
    {'slice_scores': 'x' * SHAPE[2]},
    {'positive_slices': [SHAPE[2]]},
    {'positive_slices': None},
    {'threshold': 'high'},
    {'threshold': float('nan')},
    {'values': 'mr'},
    {'model': None},
    {'lesion_ml': '1'},
  ],
)
def test_a_result_with_invalid_numbers_is_refused(tmp_path, changes):
  source, masks = case(tmp_path, **changes)
  with pytest.raises(
    UserError, match=r'^.*a\.json: damaged, or from another version \(.+\); run --mode=predict.*again$'
  ):
    viewer.view(source, masks)
  (masks / 'a.json').write_text('[1]')
  with pytest.raises(UserError, match=r'^.*a\.json: damaged'):
    viewer.view(source, masks)


def test_a_result_of_another_scan_is_refused(tmp_path):
  source, masks = case(tmp_path, num_slices=11, slice_scores=SCORES[:-1])
  with pytest.raises(UserError, match=r'a\.json: has 11 slices, but the scan a\.nii\.gz has 12; run --mode=predict'):
    viewer.view(source, masks)
  source, masks = case(tmp_path)
  nib.save(stored(lesion(), 'IPL', AFFINE + 9 * np.eye(4, k=3)), masks / 'a_mask.nii.gz')
  with pytest.raises(UserError, match=r'a_mask\.nii\.gz: the affines of the mask and its scan a\.nii\.gz differ'):
    viewer.view(source, masks)
  assert not list(masks.glob('*.html'))


def test_pictures_are_left_out_or_refused(tmp_path):
  source, masks = case(tmp_path)
  for name in ('a', 'p'):  # one has the name of the scan
    Image.new('L', (8, 8)).save(source / f'{name}.png')
  assert [path.name for path in viewer.view(source, masks)] == ['a.html']
  with pytest.raises(UserError, match=r'input: .*p\.png is an 8-bit picture; give scans'):
    viewer.view(source / 'p.png', masks)


def test_a_scan_with_the_name_of_the_index_page_is_refused(tmp_path):
  case(tmp_path)
  source, masks = case(tmp_path, 'view')
  with pytest.raises(UserError, match='rename the scan'):
    viewer.view(source, masks)


def pixels(page, rectangle=None):
  """Returns the canvas, or its part [left, top, width, height], as int [H, W, RGB]."""
  picture = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert('RGB')).astype(int)
  left, top = page.value('(({left, top}) => [left, top])(canvas.getBoundingClientRect())')
  x, y, width, height = rectangle or page.value('[0, 0, canvas.width, canvas.height]')
  return picture[round(top + y) : round(top + y + height), round(left + x) : round(left + x + width)]


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason='no Chromium or Chrome: see CONTRIBUTING.md')
def test_a_browser_shows_the_page(tmp_path):
  (path,) = viewer.view(*case(tmp_path, codes='IPL'))
  with browser.opened(path, tmp_path / 'profile', size=(960, 800)) as page:
    page.wait('document.body?.dataset.state')
    assert page.value('document.body.dataset.state') == 'shown', page.value('document.body.innerText')
    slice_and_place = lambda: page.value('[slice(), [...nv.frac2mm(nv.scene.crosshairPos)].slice(0, 3)]')

    # The crosshair starts in the lesion of the slice with the highest score.
    index, place = slice_and_place()
    voxel = np.rint(np.linalg.inv(AFFINE) @ [*place, 1])[:3].astype(int)
    assert index == voxel[2] == 3 and lesion()[tuple(voxel)]

    # In the axial view, the patient's right is on the left and the front is above. The lesion lies at the mask.
    *_, width, height = tile = page.value('[...nv.screenSlices[0].leftTopWidthHeight]')
    shown = pixels(page, tile)
    page.click('element("shown0")')
    hidden = pixels(page, tile)
    marked = np.argwhere(np.abs(shown - hidden).max(axis=2) > 20)
    scale = np.array([height / SHAPE[1], width / SHAPE[0]])
    (x, y, _) = BOX
    expected = [[y.start, x.start], [y.stop, x.stop]] * scale
    np.testing.assert_allclose([marked.min(axis=0), marked.max(axis=0)], expected, atol=0.6 * scale.max())
    assert 0.8 * np.prod(expected[1] - expected[0]) < len(marked) < 1.2 * np.prod(expected[1] - expected[0])
    (red, green, blue) = np.median(shown[tuple(marked.T)], axis=0)
    assert red > green > blue + 20
    page.click('element("shown0")')
    np.testing.assert_array_equal(pixels(page, tile), shown)
    page.value('element("opacity").value = 1, element("opacity").dispatchEvent(new Event("input"))')
    assert np.median(pixels(page, tile)[tuple(marked.T)], axis=0) == pytest.approx(COLOURS[0], abs=3)

    # Grey values at three places in each window.
    for title, centre, across in (('Mediastinum', 40, 400), ('Lung', -600, 1500)):
      page.click(f'[...document.querySelectorAll("button")].find(b => b.textContent == "{title}")')
      picture = pixels(page, tile)
      for column, row in ((16, 10), (22, 30), (2, 2)):
        grey = 255 * np.clip((hu()[column, row, 3] - centre) / across + 0.5, 0, 1)
        seen = picture[tuple(np.rint((np.array([row, column]) + 0.5) * scale).astype(int))]
        assert seen == pytest.approx(grey, abs=3), (title, column, row)

    # Clicks on rows of the list, then keys.
    for index in (0, 11, 6):
      page.click(f'element("slice{index}")')
      assert slice_and_place()[0] == index
      assert slice_and_place()[1][2] == pytest.approx((AFFINE @ [0, 0, index, 1])[2], abs=0.01)
      assert page.value('[...document.querySelectorAll("[aria-selected=true]")].map(e => e.id)') == [f'slice{index}']
      value = hu()[voxel[0], voxel[1], index]
      assert page.value('element("here").textContent') == f'slice {index}, at the crosshair {value} HU'
    page.value('list.focus()')
    for key, index in (('ArrowUp', 7), ('n', 8), ('n', 8), ('ArrowDown', 7), ('p', 4), ('Home', 11), ('PageDown', 1)):
      page.key(key)
      assert slice_and_place()[0] == index, key

    # A window set by the user.
    page.value(
      'element("centre").value = 100, element("width").value = 50, element("width").dispatchEvent(new Event("change"))'
    )
    assert page.value('[nv.volumes[0].cal_min, nv.volumes[0].cal_max]') == [75, 125]
    x, y = page.value('(({left, top}) => [left, top])(canvas.getBoundingClientRect())')
    page.drag((x + 200, y + 200), (x + 230, y + 180))
    low, high = page.value('[nv.volumes[0].cal_min, nv.volumes[0].cal_max]')
    assert (low, high) != (75, 125)
    assert page.value('+element("width").value') == pytest.approx(high - low, abs=0.06)
    assert page.problems == []


def test_classes_of_slices_have_no_masks(tmp_path):
  """As from a classifier of nine classes: colours repeat, and no mask is looked for."""
  source, masks = case(tmp_path, mask=False)
  numbers = json.loads((masks / 'a.json').read_text())
  one = {key: numbers.pop(key) for key in ('threshold', 'positive_slices', 'slice_scores')}
  del numbers['lesion_ml']
  numbers['classes'] = {f'kind {k}': one for k in range(9)}
  (masks / 'a.json').write_text(json.dumps(numbers))
  (path,) = viewer.view(source, masks)
  page = Page(path)
  assert 'mask0' not in page.scripts and 'kind 8' in page.text and 'mL' not in page.text
  assert f'.class8 {{ --colour: rgb({",".join(map(str, COLOURS[1]))})' in page.text


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason='no Chromium or Chrome: see CONTRIBUTING.md')
def test_a_browser_hides_one_class_at_a_time(tmp_path):
  """Two classes in boxes side by side: hiding one leaves the other as it is, in both orders."""
  source, masks = case(tmp_path)
  left, right = (np.zeros(SHAPE, np.uint8) for _ in range(2))
  left[5:11, 26:33, 3:5], right[20:26, 26:33, 3:5] = 1, 1
  nib.save(stored(2 * left + 5 * right, 'IPL'), masks / 'a_mask.nii.gz')
  numbers = json.loads((masks / 'a.json').read_text())
  of_class = {key: numbers.pop(key) for key in ('threshold', 'lesion_ml', 'positive_slices', 'slice_scores')}
  numbers['classes'] = {
    name: of_class | {'mask_values': [value], 'colour': list(colour)}
    for name, value, colour in (('left', 2, COLOURS[0]), ('right', 5, COLOURS[1]))
  }
  (masks / 'a.json').write_text(json.dumps(numbers))
  (path,) = viewer.view(source, masks)
  with browser.opened(path, tmp_path / 'profile', size=(960, 800)) as page:
    page.wait('document.body?.dataset.state')
    assert page.value('document.body.dataset.state') == 'shown', page.value('document.body.innerText')
    *_, width, height = tile = page.value('[...nv.screenSlices[0].leftTopWidthHeight]')
    scale = np.array([height / SHAPE[1], width / SHAPE[0]])
    # The crosshair runs through the middle of a box, so look two voxels beside it.
    middle = lambda mask: np.argwhere(mask[:, :, 3]).mean(axis=0)[::-1] + 0.5
    places = [tuple(np.rint((middle(box) - 2) * scale).astype(int)) for box in (left, right)]
    seen = lambda: [pixels(page, tile)[place].tolist() for place in places]
    both = seen()
    assert both[0][0] > both[0][2] + 20 and both[1][2] > both[1][0] + 20  # orange and blue
    for number, other in ((0, 1), (1, 0)):
      page.click(f'element("shown{number}")')
      hidden = seen()
      assert hidden[other] == both[other] and np.ptp(hidden[number]) <= 3  # grey
      page.click(f'element("shown{number}")')
      assert seen() == both
    assert page.problems == []
