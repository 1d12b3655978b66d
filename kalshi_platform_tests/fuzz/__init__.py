"""Fuzzing: what reads bytes from elsewhere is given every kind of them.

targets.py   what is fuzzed, what must hold for any input, and where to begin
inputs.py    from a fuzzer's bytes to frames and requests that are nearly right
sql.py       from bytes to SQL that tries to get out of the engine
campaign.py  `make fuzz`: coverage-guided (atheris), minutes per target
test_fuzz.py a few hundred inputs of each, the same every time, in every run of the tests
"""
