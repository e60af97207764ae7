"""An emulator of Google Cloud Storage on this machine, by gcp-storage-emulator: `python gcs_emulator.py PORT BUCKET`.

It adds what TensorStore needs: the generation of an object in downloads, and uploads that expect a generation.
"""

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus


class Bucket:
  """A bucket of a running emulator.

  Attributes:
    environment: the variables that name the emulator to gcsfs and TensorStore.
  """

  def __init__(self, url: str, name: str):
    self._url = f'{url}/storage/v1/b/{name}/o'
    self.environment = {
      'STORAGE_EMULATOR_HOST': url,
      'TENSORSTORE_GCS_HTTP_URL': url,
      # No test may ask Google's servers, for credentials or for the type of the bucket.
      'GCE_METADATA_ROOT': url.removeprefix('http://'),
      'NO_GCE_CHECK': 'true',
      'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
    }

  def names(self, folder: str) -> set[str]:
    """Returns the names of all objects under a folder, relative to it."""
    with urllib.request.urlopen(f'{self._url}?prefix={urllib.parse.quote(folder, safe="")}/') as reply:
      return {item['name'].removeprefix(f'{folder}/') for item in json.load(reply).get('items', ())}

  def write(self, name: str, content: bytes) -> None:
    url = (
      f'{self._url.replace("/storage/", "/upload/storage/")}?uploadType=media&name={urllib.parse.quote(name, safe="")}'
    )
    urllib.request.urlopen(urllib.request.Request(url, content, method='POST')).close()

  def read(self, name: str) -> bytes:
    with urllib.request.urlopen(f'{self._url}/{urllib.parse.quote(name, safe="")}?alt=media') as reply:
      return reply.read()


@contextlib.contextmanager
def running(bucket: str) -> Iterator[Bucket]:
  """Runs an emulator with an empty bucket."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  server = subprocess.Popen([sys.executable, __file__, str(port), bucket], stderr=subprocess.DEVNULL)
  try:
    until = time.monotonic() + 30
    while True:
      with contextlib.suppress(OSError), socket.create_connection(('localhost', port), 1):
        break
      assert server.poll() is None and time.monotonic() < until
      time.sleep(0.1)
    yield Bucket(f'http://localhost:{port}', bucket)
  finally:
    server.kill()
    server.wait()


def serve(port: int, bucket: str) -> None:
  from gcp_storage_emulator import server
  from gcp_storage_emulator.exceptions import NotFound
  from gcp_storage_emulator.handlers import objects

  download, upload = objects.download, objects._media_upload

  def generation(storage, name, path):
    try:
      return storage.get_file_obj(name, path)['generation']
    except NotFound:
      return '0'

  def download_with_generation(request, response, storage, *args, **kwargs):
    now = generation(storage, request.params['bucket_name'], request.params['object_id'])
    response['x-goog-generation'] = now
    download(request, response, storage, *args, **kwargs)

  def upload_if_generation(request, response, storage):
    expected = request.query.get('ifGenerationMatch')
    if expected and expected[0] != generation(storage, request.params['bucket_name'], request.query['name'][0]):
      response.status = HTTPStatus.PRECONDITION_FAILED
    else:
      upload(request, response, storage)

  objects.download, objects._media_upload = download_with_generation, upload_if_generation
  server.create_server('localhost', port, True, bucket).run()


if __name__ == '__main__':
  serve(int(sys.argv[1]), sys.argv[2])
