"""The typed configuration: schemas, composition, checks. A leaf: it imports nothing else of the package."""
