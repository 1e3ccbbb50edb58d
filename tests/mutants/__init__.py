"""Would the tests notice if a line were wrong? `make mutants`: not a test, and not in CI.

Each part of the code that nothing may get past (limits, keys, resumption) is changed in one place
after another by `mutmut`, and the tests beside it have to fail. What they miss and may miss, since
the change changes nothing that anybody could see, is in `survivors.yaml`, each with the reason.
"""
