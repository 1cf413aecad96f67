"""What several tests share: data, runs, samples, golden values."""
