"""The chain of `plan`: each policy answers for one kind of situation, or passes it on with None."""
