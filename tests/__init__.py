"""The tests of all rooms; a package so that one room's tests can use another's tools."""
