"""One mistake is found wherever a task group put it."""

from __future__ import annotations

import asyncio

import pytest

from disagg.config.errors import ConfigError, found_in, leaves

MISTAKE = ConfigError("the value")


@pytest.mark.parametrize(
    "error",
    [
        MISTAKE,
        ExceptionGroup("tasks", [MISTAKE]),
        ExceptionGroup("tasks", [OSError("a consequence"), MISTAKE]),
        BaseExceptionGroup("tasks", [KeyboardInterrupt(), ExceptionGroup("inner", [ValueError(), MISTAKE])]),
    ],
)
def test_a_mistake_is_found_alone_and_in_groups(error: BaseException) -> None:
    assert found_in(error, ConfigError) is MISTAKE


def test_other_errors_are_none() -> None:
    assert found_in(ExceptionGroup("tasks", [OSError(), ValueError()]), ConfigError) is None
    assert list(map(type, leaves(ExceptionGroup("tasks", [OSError(), ValueError()])))) == [OSError, ValueError]


def test_a_task_group_hides_a_mistake_from_except_and_not_from_us() -> None:
    async def fail() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(asyncio.sleep(60))
            raise MISTAKE

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(fail())
    assert found_in(caught.value, ConfigError) is MISTAKE
