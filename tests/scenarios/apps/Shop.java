import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpServer;
import com.zaxxer.hikari.HikariConfig;
import com.zaxxer.hikari.HikariDataSource;
import java.io.IOException;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.sql.Connection;
import java.sql.SQLException;
import java.sql.Statement;
import java.util.List;
import java.util.concurrent.CopyOnWriteArrayList;
import java.util.concurrent.Executors;

/**
 * The JDK's own HTTP server with HikariCP: Shop.java PORT SQL-PORT POOL FREE-PORT. /leak does not give its connection back, a
 * request to the other port gives all of them back.
 */
public class Shop {
    private static final List<Connection> LEAKED = new CopyOnWriteArrayList<>();

    public static void main(String[] args) throws Exception {
        HikariConfig config = new HikariConfig();
        config.setJdbcUrl("jdbc:postgresql://127.0.0.1:" + args[1] + "/postgres?sslmode=disable");
        config.setUsername("postgres");
        config.setMaximumPoolSize(Integer.parseInt(args[2]));
        config.setConnectionTimeout(60_000);
        HikariDataSource pool = new HikariDataSource(config);
        HttpServer server = listen(args[0]);
        server.createContext("/", exchange -> {
            try {
                Connection connection = pool.getConnection();
                try (Statement statement = connection.createStatement()) {
                    statement.execute("SELECT pg_sleep(0.02)");
                }
                if (exchange.getRequestURI().getPath().equals("/leak")) {
                    LEAKED.add(connection);
                } else {
                    connection.close();
                }
            } catch (SQLException error) {
                throw new IOException(error);
            }
            answer(exchange);
        });
        server.setExecutor(Executors.newFixedThreadPool(40));
        server.start();
        HttpServer free = listen(args[3]);
        free.createContext("/", exchange -> {
            try {
                for (Connection connection : LEAKED) {
                    connection.close();
                }
            } catch (SQLException error) {
                throw new IOException(error);
            }
            answer(exchange);
        });
        free.start();
        System.out.println("listening");
    }

    private static HttpServer listen(String port) throws IOException {
        return HttpServer.create(new InetSocketAddress(InetAddress.getLoopbackAddress(), Integer.parseInt(port)), 400);
    }

    private static void answer(HttpExchange exchange) throws IOException {
        byte[] answer = "ok\n".getBytes();
        exchange.sendResponseHeaders(200, answer.length);
        exchange.getResponseBody().write(answer);
        exchange.close();
    }
}
