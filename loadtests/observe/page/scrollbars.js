// The bundler reads this package's default export as Node.js does, which is not what Grafana's components expect.
import { Scrollbars } from './node_modules/react-custom-scrollbars-2/lib/index.js';

export default Scrollbars;
