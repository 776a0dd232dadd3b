"""The OpenAPI description of bodies that are read by `bodies.read`."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_PLACE = "#/components/schemas/{model}"


class Described(FastAPI):
    """A FastAPI whose description knows the bodies that its routes read by themselves."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._bodies: set[type[BaseModel]] = set()

    def body(self, kind: type[BaseModel]) -> dict[str, Any]:
        """`openapi_extra` of a route that reads such a body."""
        self._bodies.add(kind)
        schema = {"$ref": _PLACE.format(model=kind.__name__)}
        content = {"application/json": {"schema": schema}}
        return {"requestBody": {"required": True, "content": content}}

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            description = super().openapi()
            kinds = sorted(self._bodies, key=lambda kind: kind.__name__)
            _, definitions = models_json_schema(
                [(kind, "validation") for kind in kinds], ref_template=_PLACE
            )
            schemas = description.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(definitions.get("$defs", {}))
            self.openapi_schema = description
        return self.openapi_schema
