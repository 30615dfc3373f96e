"""Ctrl-C, SIGTERM and SIGHUP (a closed terminal) as a request to end the step, save and leave."""

import os
import signal
import threading
from contextlib import suppress
from typing import Any

SIGNALS = [number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None))]


class StopSignals:
    """`requested`: one of the signals came; `status`: the exit status for it. A second Ctrl-C raises as usual."""

    def __init__(self) -> None:
        self.requested, self.status = False, 0
        self._earlier_handlers: dict[int, Any] = {}

    def catch(self) -> None:
        if threading.current_thread() is not threading.main_thread():  # Python allows handlers nowhere else
            return
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                self._earlier_handlers[number] = signal.signal(number, self._handle)

    def release(self) -> None:
        for number, handler in self._earlier_handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._earlier_handlers = {}

    def _handle(self, number: int, frame) -> None:
        if self.requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.requested = True  # first: the next signal may come while this one is announced
        self.status = 128 + number
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        text = f"\n{name}: ending this step and saving; press Ctrl-C (again) to stop at once, without saving\n"
        with suppress(OSError):
            os.write(2, text.encode())  # the signal may have interrupted a print(), which cannot be entered twice
