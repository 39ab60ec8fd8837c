"""What a run learned and forgot, to be seen: figures, pages and the numbers behind them. No torch."""
