"The page of a predictor in a real browser: choose or drop a photo, see bars and heat; what is no photo is said."
import base64
import io
import json
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from test_interpret import KINDS, jpeg, my_net
from torch import nn

from exp import interpret as I

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no browser here")
NASTY = "<img src=x onerror=document.title='hacked'>"


@pytest.fixture(scope="module")
def server():
    torch.manual_seed(0)
    net = my_net(4, 5)
    nn.init.normal_(net[3].weight, 0, 5)
    made = I.page_server(I.Predictor(net, [*KINDS, NASTY], (64, 64), (.5,)*3, (.25,)*3, device="cpu"), 0)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown(); made.server_close(); thread.join(10)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        made = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser, server):
    made = browser.new_page()
    made.trouble, made.asked = [], []
    made.on("console", lambda message: made.trouble.append(message.text) if message.type == "error" else None)
    made.on("pageerror", lambda error: made.trouble.append(str(error)))
    made.on("request", lambda request: made.asked.append(request.url))
    made.goto(f"http://127.0.0.1:{server.server_port}/")
    yield made
    made.close()


def upload(name="card.jpg", content=None): return dict(name=name, mimeType="image/jpeg", buffer=jpeg() if content is None else content)


def says(page, word): sync_api.expect(page.locator("#said")).to_contain_text(word, timeout=20_000)


def answered(page): says(page, "Most likely")


def test_choose_a_photo_and_see_bars_and_heat(page, server):
    page.set_input_files("#file", upload())
    answered(page)
    want = server.predictor(jpeg())
    rows = page.locator("#bars li")
    assert rows.count() == 4 and page.inner_text("#said") == f"Most likely: {next(iter(want))}"
    for i, (name, p) in enumerate(want.items()):
        assert name in rows.nth(i).inner_text() and f"{100*p:.1f} %" in rows.nth(i).inner_text()
        assert abs(float(rows.nth(i).locator("meter").evaluate("meter => meter.value")) - p) < 1e-4
    for part in ("#photo", "#heat"):
        assert page.locator(part).is_visible() and page.locator(part).evaluate("im => im.complete && im.naturalWidth") == 64
    over = [page.locator(part).bounding_box() for part in ("#photo", "#heat")]
    assert over[0] == over[1], "the heat lies on the photo"
    assert page.title() == "What is on this photo?" and page.locator("#bars img").count() == 0, "a class name is text, not HTML"
    assert not page.trouble, page.trouble


def test_drop_a_photo(page):
    data = page.evaluate_handle("""bytes => { const data = new DataTransfer()
        data.items.add(new File([new Uint8Array(bytes)], 'card.jpg', {type: 'image/jpeg'})); return data }""", list(jpeg(3)))
    page.dispatch_event("#drop", "dragover", {"dataTransfer": data})
    page.dispatch_event("#drop", "drop", {"dataTransfer": data})
    answered(page)
    assert page.locator("#bars li").count() == 4 and page.url.endswith("/"), "the browser did not open the photo itself"


def test_what_is_no_photo_is_said_and_the_old_answer_goes(page):
    page.set_input_files("#file", upload())
    answered(page)
    page.set_input_files("#file", upload("note.jpg", b"dear diary"))
    says(page, "cannot be read")
    assert page.locator("#bars li").count() == 0 and not page.locator("#seen").is_visible()


def test_a_file_that_is_too_large_never_leaves_the_browser(page):
    page.evaluate("ask(new File([new Uint8Array(20000001)], 'film.mov'))")
    says(page, "too large")
    assert not [url for url in page.asked if url.endswith("/predict")]


def test_the_last_question_is_the_one_answered(page, server):
    first, second = (json.dumps(list(jpeg(i))) for i in (1, 2))
    page.evaluate(f"for (const bytes of [{first}, {second}]) ask(new File([new Uint8Array(bytes)], 'a.jpg'))")
    answered(page)
    page.wait_for_timeout(300)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(page.get_attribute("#photo", "src").split(",")[1]))))
    assert (shown == server.predictor.pixels(jpeg(2)).permute(1, 2, 0).numpy()).all()


def test_nothing_comes_from_elsewhere_and_a_silent_server_is_said(page, server):
    page.set_input_files("#file", upload())
    answered(page)
    assert all(url.startswith((f"http://127.0.0.1:{server.server_port}/", "data:")) for url in page.asked)
    page.route("**/predict", lambda route: route.abort())
    page.set_input_files("#file", upload("again.jpg"))
    says(page, "No answer")
