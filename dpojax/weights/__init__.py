"""How do weights get in and out?"""
