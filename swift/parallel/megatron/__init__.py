"""Training by Megatron-Core: weights both ways, its model, its schedules behind our contract."""
