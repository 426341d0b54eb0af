"""Virtual time for asyncio: when nothing is ready, the clock jumps to the next timer instead of waiting for it.

What runs under it is the program's own code, at its own cost in CPU seconds, of which the virtual clock sees none.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop with a clock of its own. Work for a thread (``asyncio.to_thread``) is done at once, in this one, so
    that the clock cannot pass it."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_Jumping(self._jump))

    def time(self) -> float:
        return self._now

    def monotonic(self) -> float:
        """The same under the name that the module ``time`` has for it."""
        return self._now

    def _jump(self, seconds: float) -> None:
        self._now += seconds

    def run_in_executor(
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:
            done.set_exception(error)
        return done


class _Jumping(selectors.DefaultSelector):
    def __init__(self, jump: Callable[[float], None]) -> None:
        super().__init__()
        self._go = jump

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise RuntimeError("nothing is ready and no timer is set: it would wait for ever")
        if timeout > 0:
            self._go(timeout)
        return super().select(0)


@contextmanager
def virtual_time(modules: Sequence[ModuleType]) -> Iterator[VirtualLoop]:
    """A new loop, which the ``time.monotonic`` of ``modules`` follows too."""
    loop = VirtualLoop()
    patches = [patch.object(module, "time", loop) for module in modules]
    try:
        for one in patches:
            one.start()
        yield loop
    finally:
        for one in patches:
            one.stop()
        loop.close()


def run(loop: VirtualLoop, main: Coroutine[Any, Any, Any]) -> Any:
    """Run ``main`` on ``loop`` to its end."""
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(main)
    finally:
        asyncio.set_event_loop(None)
