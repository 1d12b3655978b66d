def test_x(start_simulator):
    s = start_simulator(markets=3)
    assert len(s.books()) == 3
