"""What the hub refuses, in words that say what to do: the real client against a server that answers like the hub."""

import http.server
import json
import subprocess
import sys
import threading

import datasets
import httpx
import pytest
from transformers import PreTrainedConfig

from slimllm_nb.sources import SourceError, load_model, load_texts
from slimllm_nb.sources.hub import HUB_VARIABLE

ASK = """
import sys
from slimllm_nb.sources import SourceError, load_model
try:
    load_model("owner/model", revision=sys.argv[1] or None)
except SourceError as error:
    print(error)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers every request with the status and error code of `answers`, as the hub does."""

    def do_GET(self):
        code, error = self.server.answers
        body = json.dumps({"error": error or "?"}).encode()
        self.send_response(code)
        if error:
            self.send_header("X-Error-Code", error)
            self.send_header("X-Error-Message", error)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def ask(tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def answer(answers, revision=""):
        server.answers = answers
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        command = [sys.executable, "-c", ASK, revision]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    yield answer
    server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answers", "revision", "message"),
    [
        ((403, "GatedRepo"), "", "it is gated: accept its licence at https://huggingface.co/owner/model, then log in"),
        ((404, "RevisionNotFound"), "abc", "it has no revision 'abc': give a commit, tag or branch"),
        ((401, "RepoNotFound"), "", "there is none, or it is private and no token is set"),
    ],
)
def test_refused_by_the_hub(answers, revision, message, ask):
    printed = ask(answers, revision=revision)
    assert printed.startswith("cannot load the model 'owner/model': ") and message in printed


@pytest.mark.parametrize(("what", "name"), [("model", "owner/model"), ("data set", "ptb-text-only/ptb_text_only")])
def test_without_network(what, name, monkeypatch):
    """What the client raises after its retries."""

    def unreachable(*_, **__):
        raise OSError("We couldn't connect to the hub") from httpx.ConnectError("Connection refused")

    monkeypatch.delenv(HUB_VARIABLE, raising=False)
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(SourceError) as found:
        load_model("owner/model") if what == "model" else load_texts("ptb", "held-out")
    assert str(found.value).startswith(f"cannot load the {what} '{name}': the hub cannot be reached: check the network")
    assert "SLIMLLM_NB_HUB" in str(found.value)
