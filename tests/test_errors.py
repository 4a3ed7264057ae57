"""User errors survive JSON and pickle."""

from __future__ import annotations

import json
import pickle

import pytest

from antdist.errors import UserError
from antdist.io.storage import Unreachable


@pytest.mark.parametrize(
    "error",
    [UserError("torn"), UserError("torn", where="a.tar", remedy="prepare again"), Unreachable("s3://b", "no answer")],
)
def test_an_error_survives_json_and_pickle(error: UserError) -> None:
    for copy in (UserError.from_dict(json.loads(json.dumps(error.to_dict()))), pickle.loads(pickle.dumps(error))):
        assert str(copy) == str(error) and copy.to_dict() == error.to_dict()
