"""The tests, in folders that mirror the packages; a package, so that no other `tests` is found before it."""
