from dmquant_example import Example, PowerOfTwoStep

from dmquant.testing import MethodContract, QuantizerContract


class TestExample(MethodContract):
    method = Example


class TestPowerOfTwoStep(QuantizerContract):
    def make(self) -> PowerOfTwoStep:
        return PowerOfTwoStep(4, num_channels=5)


def test_every_step_is_a_power_of_two():
    quantizer = PowerOfTwoStep(4)
    quantizer.scale.data.fill_(0.3)
    assert quantizer.grid()[0] == 0.25
