"""`get_tokenizer()` of both SDK clients where no hub can be reached: the server stands in for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY_MODEL, LiveServer
from tests.models.tiny import tiny_tokenizer

SCRIPT = """
import json, sys, tinker
client = tinker.ServiceClient(base_url=sys.argv[1], api_key=sys.argv[2])
if sys.argv[3] == "training":
    tokenizer = client.create_lora_training_client(sys.argv[4], rank=2).result().get_tokenizer()
else:
    tokenizer = client.create_sampling_client(base_model=sys.argv[4]).result().get_tokenizer()
chat = tokenizer.apply_chat_template([{"role": "user", "content": "Ahoy, 42!"}], tokenize=False)
print(json.dumps({"ids": tokenizer.encode("Ahoy, 42!"), "chat": chat, "eos": tokenizer.eos_token_id}))
"""


@pytest.mark.parametrize("client", ["training", "sampling"])
def test_both_clients_get_the_models_own_tokenizer(tiny_server: LiveServer, tmp_path: Path, client: str) -> None:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": tiny_server.url,
        "HF_HOME": str(tmp_path),  # nothing cached from before
        "TINKER_TELEMETRY": "0",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, tiny_server.url, tiny_server.key, client, TINY_MODEL],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ids"] == tiny_tokenizer().encode("Ahoy, 42!")
    assert found["chat"] == "<|im_start|>user\nAhoy, 42!<|im_end|>\n"
    assert found["eos"] == 2
