"""Drives a page in headless Chromium over two pipes (DevTools protocol). This needs no driver."""

import base64
import contextlib
import json
import os
import pathlib
import select
import shutil
import subprocess
import time
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
# The CPU draws WebGL 2, and Chromium makes no network requests of its own.
_FLAGS = [
  '--headless=new',
  '--no-sandbox',
  '--use-gl=angle',
  '--use-angle=swiftshader',
  '--enable-unsafe-swiftshader',
  '--hide-scrollbars',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
  '--disable-extensions',
  '--disable-dev-shm-usage',
  '--force-device-scale-factor=1',
  '--force-color-profile=srgb',
  '--remote-debugging-pipe',
]


class Page:
  """One page. `problems` collects console warnings and errors, and requests for anything but the page's own file."""

  def __init__(self, pipes: tuple[int, int], seconds: float):
    self._to, self._from, self._seconds = *pipes, seconds
    self._rest, self._number, self._session = b'', 0, None
    self.problems = []

  def open(self, path: pathlib.Path) -> None:
    target = self.call('Target.createTarget', url='about:blank')['targetId']
    self._session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
    for domain in ('Runtime', 'Log', 'Network', 'Page'):
      self.call(f'{domain}.enable')
    self._file = path.resolve().as_uri()
    self.call('Page.navigate', url=self._file)

  def call(self, method: str, **parameters: Any) -> dict:
    """Sends a command and returns its result. Problems reported before the result go to `problems`."""
    self._number += 1
    message = {'id': self._number, 'method': method, 'params': parameters}
    if self._session:
      message['sessionId'] = self._session
    os.write(self._to, json.dumps(message).encode() + b'\0')
    end = time.monotonic() + self._seconds
    while True:
      answer = self._receive(end)
      if answer.get('id') == self._number:
        assert 'error' not in answer, answer
        return answer['result']
      self._note(answer)

  def value(self, script: str) -> Any:
    """Evaluates a JavaScript expression, awaits it if it is a promise, and returns its value."""
    result = self.call('Runtime.evaluate', expression=script, returnByValue=True, awaitPromise=True)
    assert 'exceptionDetails' not in result, result
    return result['result'].get('value')

  def wait(self, script: str) -> None:
    """Waits until an expression is true."""
    end = time.monotonic() + self._seconds
    while not self.value(script):
      assert time.monotonic() < end, (script, self.problems)
      time.sleep(0.05)

  def key(self, key: str) -> None:
    for event in ('keyDown', 'keyUp'):
      self.call('Input.dispatchKeyEvent', type=event, key=key, code=key)

  def click(self, script: str) -> None:
    """Clicks the middle of the element that an expression returns."""
    box = f'(({script}).scrollIntoView({{block: "nearest"}}), ({script}).getBoundingClientRect().toJSON())'
    box = self.value(box)
    self.mouse(box['x'] + box['width'] / 2, box['y'] + box['height'] / 2)

  def mouse(self, x: float, y: float) -> None:
    for event in ('mousePressed', 'mouseReleased'):
      self.call('Input.dispatchMouseEvent', type=event, x=x, y=y, button='left', clickCount=1)

  def drag(self, start: tuple[float, float], end: tuple[float, float], steps: int = 4) -> None:
    """Drags with the right mouse button."""
    event = lambda kind, x, y: self.call('Input.dispatchMouseEvent', type=kind, x=x, y=y, button='right', buttons=2)
    event('mousePressed', *start)
    for step in range(1, steps + 1):
      event('mouseMoved', *(a + (b - a) * step / steps for a, b in zip(start, end, strict=True)))
    event('mouseReleased', *end)

  def screenshot(self) -> bytes:
    """Returns a PNG image of the page."""
    return base64.b64decode(self.call('Page.captureScreenshot', format='png')['data'])

  def _receive(self, end):
    while b'\0' not in self._rest:
      ready, _, _ = select.select([self._from], [], [], max(0, end - time.monotonic()))
      assert ready, 'Chromium does not answer'
      self._rest += os.read(self._from, 1 << 20)
    message, _, self._rest = self._rest.partition(b'\0')
    return json.loads(message)

  def _note(self, event):
    method, params = event.get('method'), event.get('params', {})
    if method == 'Runtime.exceptionThrown' or (
      method == 'Runtime.consoleAPICalled' and params['type'] in ('error', 'warning', 'assert')
    ):
      self.problems.append(params)
    elif method == 'Log.entryAdded' and params['entry']['level'] in ('error', 'warning'):
      self.problems.append(params['entry'])
    elif method == 'Network.requestWillBeSent' and not params['request']['url'].startswith((self._file, 'data:')):
      self.problems.append(params['request']['url'])


@contextlib.contextmanager
def opened(path: pathlib.Path, profile: pathlib.Path, size: tuple[int, int], seconds: float = 60):
  """Opens a file as a `Page`; Chromium ends with the block.

  Args:
    path: the HTML file.
    profile: an empty folder for Chromium's profile.
    size: width and height of the window in pixels.
    seconds: time limit of each command and wait.
  """
  to_read, to = os.pipe()
  back, back_write = os.pipe()

  def connect():  # Chromium reads from 3 and writes to 4
    ends = os.dup(to_read), os.dup(back_write)
    os.dup2(ends[0], 3)
    os.dup2(ends[1], 4)

  command = [CHROMIUM, *_FLAGS, f'--user-data-dir={profile}', f'--window-size={size[0]},{size[1]}', 'about:blank']
  process = subprocess.Popen(
    command, preexec_fn=connect, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  os.close(to_read)
  os.close(back_write)
  try:
    page = Page((to, back), seconds)
    page.open(path)
    yield page
  finally:
    process.kill()
    process.wait()
    os.close(to)
    os.close(back)
