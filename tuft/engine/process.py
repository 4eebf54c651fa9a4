"""The engine process: ``python -m tuft.engine.process <socket>``, started by ``engine.worker`` alone."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading
from queue import SimpleQueue

from tuft.engine.mailbox import Batch, LoadFailed, Mailbox, Ready, Setup


def main() -> None:
    # Ctrl-C in a terminal and a service's stop reach the whole group; the parent decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    mailbox = Mailbox(socket.socket(fileno=int(sys.argv[1])))
    try:
        setup = mailbox.receive()
    except EOFError:
        return  # closed before it began
    assert isinstance(setup, Setup)
    inbox: SimpleQueue[Batch] = SimpleQueue()
    threading.Thread(target=_read, args=(mailbox, inbox), name="engine-reader", daemon=True).start()

    # torch: after the reader has begun to watch for the parent's end
    from tuft.engine.adapters import Adapters
    from tuft.engine.device import keep_freed_memory, settled
    from tuft.engine.executor import Executor
    from tuft.engine.failures import engine_error
    from tuft.engine.kernels import KernelUpgrade
    from tuft.engine.loaded import load_models
    from tuft.engine.memory import adapter_memory

    try:
        settings = settled(setup.settings)
        models = load_models(setup.sources, settings)
        adapters = Adapters(models, adapter_memory([model.decoder for model in models], settings))
    except Exception as error:  # noqa: BLE001 (whatever it is, the parent is told)
        mailbox.send(LoadFailed(engine_error(error, "loading the base models")))
        return
    wait = settings.deterministic is not False
    kernels = KernelUpgrade([model.decoder for model in models], settings.kernel_cache, wait)
    keep_freed_memory()  # from here on: what loading needed goes back to the system
    pass_tokens = models[0].trainer.micro_batch_tokens  # what fits into memory, of what is wanted
    mailbox.send(Ready(tuple(model.info for model in models), pass_tokens))
    try:
        Executor(adapters, inbox, mailbox.send, pass_tokens, kernels.poll).run()
    except BrokenPipeError:
        return  # the parent is gone; the reader sees it too


def _read(mailbox: Mailbox, inbox: SimpleQueue[Batch]) -> None:
    while True:
        try:
            letter = mailbox.receive()
        except EOFError:
            os._exit(0)  # the parent is gone, or wants no more: nobody waits for what is being computed
        assert isinstance(letter, Batch)
        inbox.put(letter)


if __name__ == "__main__":
    main()
