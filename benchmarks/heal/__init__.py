"""What training brings back of what a conversion has lost, step by step, and what that costs."""
