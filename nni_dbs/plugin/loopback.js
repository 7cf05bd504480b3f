// Preloaded into NNI's manager: servers without an address listen on the loopback address, not on all.
const net = require("net");
const listen = net.Server.prototype.listen;
net.Server.prototype.listen = function (port, ...others) {
  const open = typeof port === "number" && typeof others[0] !== "string";
  return listen.call(this, port, ...(open ? ["127.0.0.1"] : []), ...others);
};
