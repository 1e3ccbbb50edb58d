"""What an application's gateways share, in Ray actors that outlive them: leases, scaling."""
