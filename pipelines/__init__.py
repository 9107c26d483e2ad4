"""What happens, in what order, and where it is kept: stages on Ray, addressed by what they were made from."""
