# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser: over hand-made counts, and over a real server's."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from tests.serving.app import Counters, describe_precisions, make_app, serve
from tests.serving.browser import browse
from tests.serving.conftest import EXPERTS, KEY, LAYERS
from tests.serving.test_server import new_prompt
from vllm_mixprec.experts.snapshot import ExpertSnapshot
from vllm_mixprec.serving.routes import PREFIX

PAGE = f"{PREFIX}/dashboard"
SIZES = [(4, 16), (60, 256)]


@pytest.fixture
def shots(tmp_path) -> Path:
    """Where screenshots go; ``MIXPREC_SCREENSHOTS`` names a folder to keep them in."""
    folder = Path(os.environ.get("MIXPREC_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def busy(layers: int = 4, experts: int = 16) -> Counters:
    """Uneven counts of 1000 tokens, the same at every call; one expert of layer 0 is idle."""
    counters = Counters(layers, experts)
    generator = np.random.default_rng(0)
    weights = generator.gamma(0.6, size=(layers, experts))
    weights[0, 1] = 0
    for row in weights:
        row /= row.sum()
    counters.work(np.stack([generator.multinomial(2000, row) for row in weights]))
    return counters


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 900), (360, 740)], ids=["desk", "phone"])
@pytest.mark.parametrize("shape", SIZES, ids=["4x16", "60x256"])
def test_page_fits_and_shows_the_counts(shots, shape, size, dark):
    counters = busy(*shape)
    with serve(make_app(counters)) as url, browse(url + PAGE, *size, dark) as page:
        page.wait_for_polls(2)
        assert page.data("body", "state") == "live"
        assert page.data("#heat", "activations") == str(counters.total.sum())
        assert (page.data("#heat", "layers"), page.data("#heat", "experts")) == tuple(
            str(n) for n in shape
        )
        assert page.run("return document.documentElement.scrollWidth <= innerWidth")
        assert page.run("return document.querySelectorAll('#balance tr').length") == shape[0]
        name = f"{shape[0]}x{shape[1]}-{size[0]}-{'dark' if dark else 'light'}.png"
        image = Image.open(io.BytesIO(page.screenshot(shots / name))).convert("RGB")
        corner = sum(image.getpixel((2, image.height // 2)))
        assert (corner < 150) == dark  # the page's own background
        assert page.console_errors() == []


def test_map_paints_load_and_precision():
    counters = Counters(2, 16)
    counters.work(np.array([[100] + [0] * 15, [0] * 15 + [100]]))
    with serve(make_app(counters)) as url, browse(url + PAGE) as page:
        page.wait_for_polls()
        pixels = page.run(
            """const heat = document.querySelector('#heat'), scale = devicePixelRatio;
            const width = heat.width / 16, height = heat.height / 2;
            const at = (r, c, y) => [...heat.getContext('2d').getImageData(
                Math.round((c + 0.1) * width), Math.round((r + y) * height), 1, 1).data];
            return {busy: at(0, 0, .3), other: at(1, 15, .3), idle: at(0, 8, .3),
                bf16: at(0, 0, .9), fp8: at(0, 5, .9), int4: at(0, 12, .9)}"""
        )
    assert pixels["busy"] == pixels["other"] == [8, 42, 99, 255]  # the ramp's end
    assert pixels["idle"] == [243, 244, 246, 255]
    assert pixels["bf16"] == [204, 121, 167, 255]
    assert pixels["fp8"] == [0, 158, 115, 255]
    assert pixels["int4"] == [230, 159, 0, 255]


def test_scale_and_window_can_be_chosen():
    counters = busy()
    with serve(make_app(counters)) as url, browse(url + PAGE) as page:
        page.wait_for_polls()
        picture = "return document.querySelector('#heat').toDataURL()"
        linear = page.run(picture)
        page.find("label[for=s-log]").click()
        assert page.run(picture) != linear
        for label, minutes in (("w1", 1.0), ("w5", 5.0), ("w15", 15.0), ("w0", None)):
            page.find(f"label[for={label}]").click()
            page.wait(f"{label} to be asked for", lambda want=minutes: counters.asked[-1] == want)
        assert page.console_errors() == []


def test_keys_move_through_the_map_and_say_where():
    counters = busy()
    with serve(make_app(counters)) as url, browse(url + PAGE) as page:
        page.wait_for_polls()
        page.run("document.querySelector('#s-linear').focus()")
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
        while page.run("return document.activeElement.id") != "heat":
            before = page.run("return document.activeElement.id")
            page.driver.switch_to.active_element.send_keys(Keys.TAB)
            assert page.run("return document.activeElement.id") != before
        heat = page.find("#heat")
        assert "Layer 0, expert 0:" in page.text("#spoken")
        heat.send_keys(Keys.ARROW_RIGHT)
        assert page.text("#spoken").startswith("Layer 0, expert 1: 0 activations")
        assert "last never" in page.text("#spoken")
        heat.send_keys(Keys.ARROW_DOWN, Keys.END)
        count = int(counters.total[0, 1, 15])
        said = page.text("#spoken")
        assert said.startswith(f"Layer 1, expert 15: {count:,} activations")
        assert "gptq int4 g128, source int4" in said
        heat.send_keys(Keys.PAGE_DOWN, Keys.HOME)
        assert (page.data("#heat", "row"), page.data("#heat", "column")) == ("3", "0")
        heat.send_keys(Keys.ARROW_LEFT, Keys.ARROW_DOWN)  # stays on the map
        assert (page.data("#heat", "row"), page.data("#heat", "column")) == ("3", "0")
        heat.send_keys("b")
        row, column = np.unravel_index(counters.total[0].argmax(), (4, 16))
        assert (page.data("#heat", "row"), page.data("#heat", "column")) == (str(row), str(column))


def test_pointing_shows_an_expert():
    counters = busy()
    with serve(make_app(counters)) as url, browse(url + PAGE) as page:
        page.wait_for_polls()
        heat = page.find("#heat")
        ActionChains(page.driver).move_to_element_with_offset(heat, 3, 3).perform()
        page.wait("the tip", lambda: not page.find("#tip").get_attribute("hidden"))
        assert page.text("#tip").startswith("Layer 2, expert 8")
        assert str(counters.total[0, 2, 8]) in page.text("#detail").replace(",", "")


def test_reset_asks_first():
    counters = busy()
    with serve(make_app(counters)) as url, browse(url + PAGE) as page:
        page.wait_for_polls()
        page.find("#reset").click()
        page.find("#confirm-no").click()
        assert counters.resets == 0
        page.find("#reset").click()
        page.find("#confirm-yes").click()
        page.wait("an empty map", lambda: page.data("#heat", "activations") == "0")
        assert counters.resets == 1
        assert "1,000 tokens" in page.text("#toast")
        assert page.find("#empty").is_displayed()


def test_exports_are_saved_under_the_servers_name():
    with serve(make_app(busy())) as url, browse(url + PAGE) as page:
        page.wait_for_polls()
        for suffix in ("json", "csv"):
            page.find(f"#export-{suffix}").click()
            page.wait(suffix, lambda end=f".{suffix}": page.text("#toast").endswith(end))
            assert page.text("#toast").startswith("Saved expert-stats-hand-made-")
        assert page.console_errors() == []


def test_an_error_is_shown_and_the_page_recovers():
    counters = busy()
    with serve(make_app(counters)) as url, browse(url + PAGE) as page:
        page.wait_for_polls()
        counters.error = TimeoutError("the engine did not answer within 10 s")
        page.wait("the error", lambda: page.data("body", "state") == "error")
        assert "did not answer within 10 s" in page.text("#banner")
        assert page.data("#heat", "activations") == "8000"  # what was known stays
        counters.error = None
        page.wait("recovery", lambda: page.data("body", "state") == "live")
        assert not page.find("#banner").is_displayed()


def test_polling_rests_while_paused():
    counters = busy()
    with serve(make_app(counters)) as url, browse(url + PAGE) as page:
        page.wait_for_polls()
        page.find("#pause").click()
        page.wait("no poll under way", lambda: page.run("return running === null"))
        reads = counters.reads
        page.driver.implicitly_wait(0)
        page.run("return new Promise((done) => setTimeout(done, 4500))")
        assert counters.reads == reads
        page.find("#pause").click()
        page.wait_for_polls()
        assert counters.reads > reads


def test_a_model_without_a_plan_and_one_with_a_draft():
    counters = busy()
    counters.draft = ExpertSnapshot(
        "hand-made", ("draft.0",), 2, np.full((1, 16), 5), 40, 0, 1.7e9, 10.0
    )
    info = describe_precisions(4, 16) | {"plan": None, "quantization": None}
    info |= {"expert_layers": [], "bytes": [], "sources": [], "widened": []}
    app = make_app(counters, info=info)
    with serve(app) as url, browse(url + PAGE) as page:
        page.wait_for_polls()
        assert "none: one checkpoint" in page.text("#facts")
        page.find("label[for=of-draft]").click()
        assert page.data("#heat", "activations") == "80"
        assert page.text("#balance th") == "draft.0"
        assert page.console_errors() == []


def test_the_key_is_asked_for_kept_and_not_left_in_the_address(shots):
    counters = busy()
    with serve(make_app(counters, key="right")) as url, browse(url + PAGE, 360, 740) as page:
        assert page.find("#lock").is_displayed()
        page.screenshot(shots / "lock.png")
        page.find("#key").send_keys("wrong", Keys.ENTER)
        page.wait("a refusal", lambda: "not accepted" in page.text("#key-problem"))
        assert counters.reads == 0
        page.find("#key").send_keys("right", Keys.ENTER)
        page.wait_for_polls()
        page.driver.refresh()
        page.wait_for_polls()  # the key is still there
        page.find("#forget").click()
        assert page.find("#lock").is_displayed()
        page.driver.get("about:blank")
        page.driver.get(f"{url}{PAGE}#key=right")
        page.wait_for_polls()
        assert page.driver.current_url == url + PAGE


@pytest.mark.engine
def test_the_map_follows_a_real_server(server, shots):
    with browse(server.url + PAGE) as page:
        page.find("#key").send_keys(KEY, Keys.ENTER)
        page.wait_for_polls()
        assert (page.data("#heat", "layers"), page.data("#heat", "experts")) == (
            str(LAYERS),
            str(EXPERTS),
        )
        before = int(page.data("#heat", "activations"))
        picture = page.run("return document.querySelector('#heat').toDataURL()")
        for _ in range(5):
            server.complete(new_prompt(), 60)
        expected = server.stats()["summary"]["activations"]
        page.wait("new traffic", lambda: int(page.data("#heat", "activations")) == expected)
        assert expected > before
        assert page.run("return document.querySelector('#heat').toDataURL()") != picture
        assert page.text("#model") == "demo"
        assert "mixprec_plan.yaml" in page.text("#facts")
        assert page.run("return document.querySelectorAll('#bytes tr').length") == 3
        page.screenshot(shots / "server.png")
        # The document's own 401 is how the page got here; nothing else may be in the console.
        assert [line for line in page.console_errors() if "dashboard" not in line] == []
        assert len(page.console_errors()) == 1
