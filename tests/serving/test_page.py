"""The page at `/` in a real browser: a prompt is typed, tokens stream in colours, Stop ends them on the server too."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import gptfast
from gptfast import testing
from gptfast.serving import page
from gptfast.testing.browser import Browser, find
from gptfast.testing.live import LiveServer

KEY = "a-key-for-the-test"
STATE = "document.querySelector('#state').dataset.at"
TOKENS = "document.querySelectorAll('#output .t').length"
NEVER = "<script src='https://example.com/x.js'></script>"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A model whose answers are as long as is asked for, behind an API key."""
    folder = tmp_path_factory.mktemp("page")
    tokenizer = gptfast.GPT2Tokenizer.train(["the cat sat on the mat, and the dog. " * 20], 270)
    config = gptfast.GPT2Config(vocab_size=len(tokenizer), n_positions=8192, n_embd=32, n_layer=2, n_head=2)
    model = gptfast.GPT2LMHeadModel(config)
    with torch.no_grad():  # normalised hidden states sum to 0, so the end of text has the logit -32 wherever it is
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight[tokenizer.eos_token_id] = -1.0
    model.save_pretrained(folder / "small")
    tokenizer.save_pretrained(folder / "small")
    (folder / "keys").write_text(f"{KEY}\n")
    (folder / "keys").chmod(0o600)
    with LiveServer(folder / "small", "--api-key-file", str(folder / "keys")) as running:
        yield running


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    executable = find()
    if executable is None:
        testing.unavailable("browser", "no chromium or google-chrome on PATH; apt-get install chromium")
    with Browser(executable) as running:
        yield running


@pytest.fixture
def browser(server: LiveServer, chromium: Browser) -> Browser:
    """The page as a new visitor sees it, before anything is typed."""
    chromium.call("Storage.clearDataForOrigin", origin=server.url, storageTypes="all")
    chromium.call("Network.enable")
    chromium.call("Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    chromium.call("Emulation.clearDeviceMetricsOverride")
    chromium.open(f"{server.url}/")
    chromium.evaluate("sessionStorage.clear()")
    chromium.open("about:blank")
    chromium.problems.clear()
    chromium.open(f"{server.url}/")
    return chromium


def give_key(browser: Browser) -> None:
    """The key is typed as a user does: the page has put the focus where it belongs."""
    browser.wait("document.activeElement.id === 'key'")
    browser.type(KEY)
    browser.press("Tab")
    browser.wait("document.querySelector('#model').textContent")


def settings(browser: Browser, **values: str) -> None:
    for name, value in values.items():
        browser.evaluate(f"fields[{name!r}].set({value!r})")


def running(server: LiveServer) -> float:
    request = urllib.request.Request(f"{server.url}/metrics", headers={"authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        counts = re.findall(r"^gptfast:num_requests_(?:running|waiting)\S* (\S+)", answer.read().decode(), re.M)
    return sum(map(float, counts))


def test_a_prompt_streams_and_stop_leaves_nothing_running(server: LiveServer, browser: Browser) -> None:
    give_key(browser)
    settings(browser, max_tokens="8000", seed="3")
    browser.click("#prompt")
    browser.type("the cat ")
    browser.click("#run")
    seen = browser.wait(f"{TOKENS} > 3 && {TOKENS}")
    assert browser.evaluate(STATE) == "writing" and running(server) == 1
    browser.wait(f"{TOKENS} > {seen + 20}")
    assert browser.evaluate(f"{STATE} === 'writing' && Number(document.querySelector('#rate').textContent) > 0")
    browser.click("#stop")
    browser.wait(f"{STATE} === 'done'")
    browser.wait("document.activeElement.id === 'run'")
    assert browser.text("#state") == "Stopped"
    for _ in range(200):
        if running(server) == 0:
            break
    assert running(server) == 0, "the answer is still in the making, and nobody is there to read it"
    stopped = browser.evaluate(TOKENS)
    assert browser.evaluate(f"new Promise(done => setTimeout(() => done({TOKENS}), 300))") == stopped < 8000
    assert not [problem for problem in browser.problems if "401" not in problem]


def test_colours_figures_and_alternatives(browser: Browser) -> None:
    give_key(browser)
    settings(browser, max_tokens="30", seed="5", temperature="1")
    browser.click("#prompt")
    browser.type("the dog ")
    browser.press("Enter", control=True)
    browser.wait(f"{STATE} === 'done'")
    assert browser.text("#count") == "30" and browser.text("#output").startswith("the dog ")
    assert re.fullmatch(r"\d+(\.\d)?", browser.text("#rate")) and float(browser.text("#bits")) > 0
    # every span has the class of its probability, and the colours of the classes differ
    wrong = "tokens.filter(t => !t.span.classList.contains('b' + bucket(Math.exp(t.logprob)))).length"
    assert browser.evaluate(wrong) == 0 and browser.evaluate("tokens.every(t => t.logprob <= 0)")
    backs = "[0, 1, 2, 3, 4].map(i => getComputedStyle(document.querySelector('.foot .b' + i)).backgroundColor)"
    assert len(set(browser.evaluate(backs))) == 5
    browser.evaluate("document.querySelector('#output').focus()")
    browser.press("ArrowRight")
    assert browser.evaluate("document.querySelectorAll('#token li').length") >= 5
    # a character of several tokens shows what each of them was drawn from
    assert browser.evaluate("document.querySelectorAll('#token li.drawn').length === tokens[0].parts.length")
    assert "%" in browser.text("#spoken")
    first = browser.text("#output")
    browser.click("#keep")
    browser.click("#run")
    browser.wait(f"{STATE} === 'done' && {TOKENS} > 0")
    assert browser.text("#output") == first, "the same seed, the same text"


def test_the_key_a_wrong_value_and_a_server_that_is_gone(server: LiveServer, browser: Browser) -> None:
    browser.wait("!document.querySelector('#error').hidden")  # the page has asked for the models without a key
    assert "key" in browser.text("#error p").lower()
    give_key(browser)
    assert browser.evaluate("document.querySelector('#error').hidden")
    settings(browser, temperature="9")
    browser.click("#run")
    assert browser.text("#error p") == "Temperature: 9; allowed: 0 to 2"
    assert browser.evaluate("document.activeElement.id") == "temperature" and browser.evaluate(STATE) == "ready"
    settings(browser, temperature="1", max_tokens="5")
    browser.evaluate("document.querySelector('#prompt').value = 'the '.repeat(9000)")
    browser.click("#run")
    browser.wait(f"{STATE} === 'failed'")
    assert "8,192" in browser.text("#error p"), "the server's own words"
    browser.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    browser.evaluate("document.querySelector('#prompt').value = 'the '")
    browser.click("#run")
    browser.wait("document.querySelector('#error p').textContent === 'The server cannot be reached.'")
    assert browser.evaluate("document.querySelector('#run').hidden") is False


def test_text_of_a_model_is_text(browser: Browser) -> None:
    """What the model writes is shown as it is: no element comes of it."""
    logprobs = "{tokens: ['x'], token_logprobs: [-1], top_logprobs: [null]}"
    browser.evaluate(f"addPiece({{text: {json.dumps(NEVER)}, logprobs: {logprobs}}})")
    browser.evaluate("flush()")
    assert NEVER in browser.text("#output") and browser.evaluate("document.querySelectorAll('#output script').length") == 0


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_can_be_read_and_reached(browser: Browser, theme: str) -> None:
    """Every control has a name; text stands out from what is behind it by 4.5 to 1 (WCAG AA), in both themes; narrow, too."""
    browser.evaluate(f"theme({theme!r})")
    named = """[...document.querySelectorAll('button, input, textarea, summary')]
        .filter(e => e.getAttribute('aria-hidden') !== 'true')
        .filter(e => !(e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length)).map(e => e.outerHTML)"""
    assert browser.evaluate(named) == []
    contrast = """(() => {
        const luminance = ([r, g, b]) => [r, g, b].map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
          .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
        const back = (e) => numbers(getComputedStyle(e).backgroundColor);
        const behind = (e) => { while (back(e)[3] === 0) e = e.parentElement; return back(e); };
        const written = (e) => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
        const seen = (e) => e.checkVisibility() && written(e) && !e.disabled && !['SCRIPT', 'STYLE'].includes(e.tagName);
        return [...document.querySelectorAll('body *')].filter(seen).map(e => {
            const [a, b] = [luminance(numbers(getComputedStyle(e).color)), luminance(behind(e))];
            return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.tagName + ' ' + e.textContent.slice(0, 40)];
        }).filter(([ratio]) => ratio < 4.5);
      })()"""
    assert browser.evaluate(contrast) == []
    browser.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_page_is_one_file_under_a_strict_policy() -> None:
    body, headers = page.content()
    html = body.decode()
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
    assert policy.count("'sha256-") == 2 and "connect-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert not re.findall(r"""(?:src|href|action)\s*=\s*["'](?!#|data:)""", html), "nothing is loaded from elsewhere"
    assert not re.findall(r"""https?://(?!www\.w3\.org/2000/svg)""", html)
    assert not re.findall(r"""\s(?:on\w+|style)\s*=\s*["']""", html), "the policy forbids what stands in attributes"
    assert Path(page.FILE).stat().st_size < 64 << 10
