class RewardServer:
    pass
