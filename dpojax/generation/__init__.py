"""How are answers drawn, and who judges them?"""
