"""What would a run need on devices that are not here?"""
