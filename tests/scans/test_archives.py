"""Archives are unpacked only into the given folder, also nested ones; bad archives give one-line errors."""

import shutil
import tempfile
import zipfile

import pytest

from fusa_jax.scans.archives import unpack, unpacking, within
from fusa_jax.system.errors import UserError


@pytest.mark.parametrize('name', ['../out.txt', '/elsewhere/out.txt', 'a/../../out.txt', '..\\out.txt'])
def test_archives_are_unpacked_into_their_folder_only(tmp_path, name):
  with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as packed:
    packed.writestr('inside/a.txt', 'a')
  (tmp_path / 'to').mkdir()
  unpack(tmp_path / 'a.zip', tmp_path / 'to')
  assert (tmp_path / 'to' / 'inside' / 'a.txt').read_text() == 'a'
  with zipfile.ZipFile(tmp_path / 'a.zip', 'a') as packed:
    packed.writestr(name, 'b')
  (tmp_path / 'other').mkdir()
  with pytest.raises(UserError, match=r'a.zip: has file names that lead out of its folder; unpack it by hand'):
    unpack(tmp_path / 'a.zip', tmp_path / 'other')
  assert not list((tmp_path / 'other').iterdir()) and not (tmp_path / 'out.txt').exists()


def test_bad_archives_are_refused(tmp_path, monkeypatch):
  path = tmp_path / 'a.zip'
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as packed:
    packed.writestr('a', bytes(range(256)) * 40)
  whole = path.read_bytes()
  path.write_bytes(whole[:60] + bytes(9) + whole[69:])
  with pytest.raises(UserError, match=r'a.zip: cannot be unpacked \(\w+\); pack or copy it again'):
    unpack(path, tmp_path)
  path.write_bytes(whole[:-30])
  with pytest.raises(UserError, match=r'a.zip: cannot be unpacked \(BadZipFile\)'):
    unpack(path, tmp_path)
  encrypted = bytearray(whole)
  encrypted[6] |= 1
  encrypted[whole.index(b'PK\1\2') + 8] |= 1
  path.write_bytes(encrypted)
  with pytest.raises(UserError, match=r'a.zip: encrypted; unpack it by hand'):
    unpack(path, tmp_path)
  unknown = bytearray(whole)
  at = whole.index(b'PK\1\2') + 10
  unknown[8:10] = unknown[at : at + 2] = (9).to_bytes(2, 'little')  # Deflate64, which Windows uses for large folders
  path.write_bytes(unknown)
  with pytest.raises(UserError, match=r'a.zip: unsupported kind of .zip \(.*\); unpack it by hand'):
    unpack(path, tmp_path)
  path.write_bytes(whole)
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: shutil._ntuple_diskusage(10**6, 10**6, 9000))
  with pytest.raises(UserError, match=r'a.zip: needs 0.0 GB unpacked, but [^ ]*/[^ ]* has 0.0 GB free; set TMPDIR'):
    unpack(path, tmp_path)


def zipped(path, **files):
  path.parent.mkdir(parents=True, exist_ok=True)
  with zipfile.ZipFile(path, 'w') as packed:
    for name, content in files.items():
      packed.writestr(name.replace('__', '/'), content)
  return path


def test_nested_archives_are_read(tmp_path, monkeypatch):
  """Messages name the archive and the file in it, but not the folder around it; no temporary file is left."""
  (tmp_path / 'tmp').mkdir()
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'tmp'))
  inner = zipped(tmp_path / 'inner.zip', c='3').read_bytes()
  outer = zipped(tmp_path / 'exports' / 'MARKER' / 'outer.zip', a__b='2', **{'a__inner.zip': inner})
  (tmp_path / 'exports' / 'z').write_text('4')
  for source, expected in ((tmp_path / 'exports', ['2', '3', '4']), (outer, ['2', '3'])):
    with unpacking() as folder:
      assert [path.read_text() for path in within(source, folder)] == expected
    assert not list((tmp_path / 'tmp').iterdir())

  def refuse(source):
    with unpacking() as folder:
      raise UserError(f'{next(within(source, folder))}: bad')

  def refused(source):
    with pytest.raises(UserError) as caught:
      refuse(source)
    assert not list((tmp_path / 'tmp').iterdir())
    return str(caught.value)

  assert refused(tmp_path / 'exports') == 'outer.zip/a/b: bad'
  zipped(outer, **{'a__inner.zip': inner})
  assert refused(tmp_path / 'exports') == 'inner.zip/c: bad'
  zipped(outer, **{'a__inner.zip': inner[:-30]})
  assert refused(tmp_path / 'exports') == 'inner.zip: cannot be unpacked (BadZipFile); pack or copy it again'
  content = b''
  for _ in range(6):
    content = zipped(outer, **{'inner.zip': content}).read_bytes()
  assert refused(outer) == 'inner.zip: archives are nested 5 deep; unpack it by hand'
  outer.write_bytes(b'PK')
  assert refused(tmp_path / 'exports') == 'outer.zip: cannot be unpacked (BadZipFile); pack or copy it again'
  assert refused(outer) == f'{outer}: cannot be unpacked (BadZipFile); pack or copy it again'
