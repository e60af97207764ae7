"""Reads a page of the viewer: its tags, texts and volumes."""

import base64
import gzip
import html.parser

import nibabel as nib


class Page(html.parser.HTMLParser):
  """A parsed page: tags, attributes that can load something, script texts and the other text."""

  def __init__(self, path):
    super().__init__()
    self.tags, self.links, self.scripts, self.text, self.script = [], [], {}, '', None
    self.feed(path.read_text())
    self.close()

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))
    self.links += [value for name, value in attributes if name in ('src', 'srcset', 'href', 'data', 'action')]
    if tag == 'script':
      self.script = dict(attributes).get('id', len(self.scripts))

  def handle_endtag(self, tag):
    self.script = None

  def handle_data(self, data):
    if self.script is None:
      self.text += data
    else:
      self.scripts[self.script] = self.scripts.get(self.script, '') + data

  def volume(self, name):
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(self.scripts[name], validate=True)))
