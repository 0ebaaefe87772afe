"""Ctrl-C and interrupt() in the middle of a C++ call: many tokens, or a long prompt; in this process and in one of its own."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import gptfast.backend as backend
from gptfast import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, packed, testing
from gptfast.generation.cpp import CppRunner
from gptfast.generation.runner import Batch, Interrupted
from gptfast.generation.scheduler import Scheduler
from gptfast.testing.engine import Driver, model_of, prompts_of, row_of


@pytest.fixture(autouse=True)
def extension(request):
    if "backend_choice" in request.fixturenames:
        request.getfixturevalue("backend_choice")
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    if os.environ.get("GPTFAST_BACKEND") == "eager":
        pytest.skip("the engine calls no ops: once is enough")


def long_decode():
    """A runner and a batch whose decode takes a while: 20,000 tokens do not end by themselves."""
    model = model_of("one-head", 30_000)
    runner = CppRunner(packed.pack(model, "fp32"), 1, 500)
    driver = Driver(runner, prompts_of(600, [4]), width=500).prefill()
    return runner, driver


def test_interrupt_from_another_thread():
    """It ends within a token, what was drawn is there, and the next call is not concerned; the GIL is free meanwhile."""
    runner, driver = long_decode()
    right = Driver(runner, prompts_of(600, [4]), width=500).prefill().decode(30).rows[0].tokens
    timer = threading.Timer(0.2, runner.interrupt)
    timer.start()
    start = time.perf_counter()
    results = runner.decode(driver.batch([0]), 20_000)
    taken = time.perf_counter() - start
    timer.join()
    assert 30 < len(results) < 20_000 and taken < 10
    assert [driver.rows[0].tokens[0], *(drawn.tokens[0] for drawn in results[:30])] == right
    assert len(runner.decode(driver.batch([0]), 3)) == 3


def test_ctrl_c_ends_a_call_on_the_main_thread():
    """The handler that was there runs after the call, and gets what was drawn; it is put back."""
    runner, driver = long_decode()
    noted, before = [], signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        results = runner.decode(driver.batch([0]), 20_000)
        timer.join()
        assert noted == [signal.SIGINT] and 1 <= len(results) < 20_000
        os.kill(os.getpid(), signal.SIGINT)
        assert noted == [signal.SIGINT] * 2
    finally:
        signal.signal(signal.SIGINT, before)


# ----------------------------------------------------------------------------------------------------------------- in a long prompt


@pytest.fixture(scope="module")
def deep():
    """A prompt of 512 tokens is one pass of 40 blocks, which takes most of a second without AVX."""
    torch.manual_seed(0)
    return packed.pack(GPT2LMHeadModel(GPT2Config(300, 1024, 96, 40, 2, initializer_range=0.1)), "fp32")


def timed(seconds, action):
    """`action` in another thread after so many seconds; the list holds when."""
    when = []

    def act():
        when.append(time.perf_counter())
        action()

    timer = threading.Timer(seconds, act)
    timer.start()
    return when


@pytest.mark.parametrize("threads", [1, 2])
def test_a_step_over_a_prompt_ends_between_two_blocks(deep, threads):
    """Nothing of it has happened, and tried again it gives what it would have given."""
    with testing.forced_isa("plain"):
        runner = CppRunner(deep, threads, 20)
        prompt = prompts_of(300, [512])[0]
        row = row_of(prompt, 1)
        batch = Batch([prompt], [0], [list(range(9))], [1], [row])
        start = time.perf_counter()
        right = runner.step(batch)
        whole = time.perf_counter() - start
        assert whole > 0.02, "too short to be interrupted"
        when = timed(whole / 4, runner.interrupt)
        with pytest.raises(Interrupted):
            runner.step(batch)
        assert time.perf_counter() - when[0] < whole / 2
        assert runner.step(batch) == right and row.tokens == []


def test_a_single_token_is_not_lost_to_an_interrupt(deep):
    with testing.forced_isa("plain"):
        driver = Driver(CppRunner(deep, 1, 20), [[5, 6]]).prefill()
        timed(0.0, driver.runner.interrupt)
        for _ in range(20):
            driver.decode(1)
        assert len(driver.rows[0].tokens) == 21


def test_ctrl_c_in_a_long_prompt_leaves_the_scheduler_as_it_was(deep):
    """Forks give their pages back, the request can go on, and its answers are those of a run that nobody interrupted."""
    with testing.forced_isa("plain"):
        results = []
        for interrupted in (False, True):
            scheduler = Scheduler(CppRunner(deep, 1, 40))
            rows = [row_of(prompts_of(300, [500])[0], 1, temperature=1.0) for _ in range(3)]
            for choice, row in enumerate(rows):
                row.choice, row.limit = choice, 3
            request = scheduler.submit(rows)
            if interrupted:
                when = timed(0.1, lambda: os.kill(os.getpid(), signal.SIGINT))
                with pytest.raises(KeyboardInterrupt):
                    scheduler.step()
                assert when and not any(row.tokens for row in rows)
                assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
                scheduler.check()
            scheduler.run([request])
            assert scheduler.pool.available == 40
            results.append([row.tokens for row in rows])
        assert results[0] == results[1] and len({tuple(tokens) for tokens in results[0]}) == 3


def test_ctrl_c_in_a_long_prompt_ends_a_process_with_130(tmp_path):
    """A real one, with kernels without AVX: a chunk of its prompt takes most of a second."""
    GPT2Tokenizer.train(["the cat sat on the mat. " * 20], 300).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = GPT2Config(300, 2048, 256, 6, 4, initializer_range=0.1, bos_token_id=299, eos_token_id=299)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    command = [sys.executable, "-P", "-m", "gptfast", "generate", str(tmp_path), "the " * 1900, "--device", "cpu", "--threads", "1"]
    environment = {**os.environ, "GPTFAST_CPU_ISA": "plain"}
    child = subprocess.Popen([*command, "--seed", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    while b"seed 1" not in child.stderr.readline():
        assert child.poll() is None
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    rest, errors = child.communicate(timeout=60)
    assert child.returncode == 130 and b"Traceback" not in errors and not rest.strip(), errors
