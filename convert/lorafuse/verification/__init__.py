"""`lorafuse verify`: is a directory what its receipt says, and what its inputs make?"""
