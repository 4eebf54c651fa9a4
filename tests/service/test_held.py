from tuft.service.held import HeldRequests


def test_what_is_released_makes_room_once() -> None:
    held = HeldRequests(10)
    assert held.hold("a", 6)
    assert not held.hold("b", 5)
    assert held.hold("c", 4)
    held.release("a")
    held.release("a")
    held.release("b")
    assert not held.hold("d", 7)
    assert held.hold("d", 6)
